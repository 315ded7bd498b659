"""By which network interface processes would speak to one another, as HCCL, NCCL and gloo choose it.

    HCCL_SOCKET_IFNAME, NCCL_SOCKET_IFNAME      eth,enp    those whose names begin so
                                                =eth0      that one
                                                ^docker    all but those whose names begin so
                                                ^=docker0  all but that one
    HCCL_IF_IP                                  10.0.0.1   that with this address, whatever the name
    GLOO_SOCKET_IFNAME                          eth0       that one

Not set, HCCL takes the first name of the alphabet that is neither docker's nor the loopback, NCCL the first that the
system lists, one that begins with "ib" if there is any; and gloo the one with the address that the host's own name
resolves to. Sources: hiascend.com, envref_07_0075 (HCCL_SOCKET_IFNAME); NVIDIA's NCCL user guide, "Environment
variables"; torch 2.13, `ProcessGroupGloo::createDefaultDevice`.
"""

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, kw_only=True)
class Interface:
    """A network interface.

    Attributes:
        name: as the system has it: "eth0".
        addresses: its IP addresses, IPv4 first.
        up: whether it is switched on.
    """

    name: str
    addresses: tuple[str, ...]
    up: bool = True

    @property
    def loopback(self) -> bool:
        """Whether it reaches this machine alone."""
        return self.name == "lo" or all(_is_loopback(address) for address in self.addresses)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What was found.

    Attributes:
        interfaces: those that are up and have an address.
        host: the host's own name.
        host_addresses: what it resolves to; empty where it does not.
        chosen: by library ("HCCL", "NCCL", "gloo") the interface that would be taken; None for none.
        warnings: what keeps several machines apart; with what to do.
        broken: what no process group can start with; with what to do.
    """

    interfaces: tuple[Interface, ...]
    host: str
    host_addresses: tuple[str, ...]
    chosen: dict[str, str | None]
    warnings: tuple[str, ...]
    broken: tuple[str, ...]


def look_at_network() -> Network:
    """The interfaces of this machine, and which of them each library would take."""
    host = socket.gethostname()
    return judge_network(_interfaces(), host=host, host_addresses=_resolved(host), environment=os.environ)


def judge_network(
    interfaces: Sequence[Interface], *, host: str, host_addresses: Sequence[str], environment: Mapping[str, str]
) -> Network:
    """Which interface each library would take under these variables, and what is wrong with that."""
    usable = tuple(one for one in interfaces if one.up and one.addresses)
    names = [one.name for one in usable]
    warnings, broken = [], []
    chosen: dict[str, str | None] = {}
    for library, choose in _CHOICES.items():
        variable = f"{library.upper()}_SOCKET_IFNAME"
        setting = environment.get(variable, "")
        address = environment.get("HCCL_IF_IP", "") if library == "HCCL" else ""
        if address:
            chosen[library] = next((one.name for one in usable if address in one.addresses), None)
            if chosen[library] is None:
                broken.append(
                    f"HCCL_IF_IP={address} is no address of this machine; its own are "
                    f"{', '.join(each for one in usable for each in one.addresses)}; set it to one of them, or unset it"
                )
        elif setting:
            fitting = _named(setting, names) if library == "gloo" else _matching(setting, names)
            chosen[library] = fitting[0] if fitting else None
            if not fitting:
                broken.append(
                    f"{variable}={setting} names no network interface that is up and has an address; here are "
                    f"{', '.join(names) or 'none'}; set it to one of them, or unset it"
                )
        else:
            chosen[library] = choose(usable, host_addresses)
    if usable and all(one.loopback for one in usable):
        warnings.append(
            "the only network interface is the loopback: processes of this machine reach one another, those of others "
            "do not; give the machine (of a container: --network host) an interface that the others reach"
        )
    elif not host_addresses:
        warnings.append(
            f"the host's own name, {host!r}, does not resolve: gloo falls back on the loopback, so several machines do "
            f"not find one another; write the name into /etc/hosts, or set GLOO_SOCKET_IFNAME={_outward(usable)}"
        )
    elif not environment.get("GLOO_SOCKET_IFNAME") and all(map(_is_loopback, host_addresses)):
        warnings.append(
            f"the host's own name, {host!r}, resolves to {', '.join(host_addresses)} alone: gloo takes the loopback, "
            "so several machines do not find one another; write the address that others see into /etc/hosts, or set "
            f"GLOO_SOCKET_IFNAME={_outward(usable)}"
        )
    return Network(
        interfaces=usable,
        host=host,
        host_addresses=tuple(host_addresses),
        chosen=chosen,
        warnings=tuple(warnings),
        broken=tuple(broken),
    )


def _matching(setting: str, names: Sequence[str]) -> list[str]:
    excluded = setting.startswith("^")
    text = setting.removeprefix("^")
    exact = text.startswith("=")
    wanted = [one for one in text.removeprefix("=").split(",") if one]
    fits = {name: any(name == one if exact else name.startswith(one) for one in wanted) for name in names}
    return [name for name in names if fits[name] != excluded]


def _named(setting: str, names: Sequence[str]) -> list[str]:
    # Gloo takes all of a list, and fails where one is not there.
    wanted = setting.split(",")
    return wanted if all(name in names for name in wanted) else []


def _rank(name: str) -> int:
    return 2 if name.startswith("lo") else int(name.startswith("docker"))


def _of_hccl(usable: Sequence[Interface], _: Sequence[str]) -> str | None:
    return min((one.name for one in usable), key=lambda name: (_rank(name), name), default=None)


def _of_nccl(usable: Sequence[Interface], _: Sequence[str]) -> str | None:
    return min((one.name for one in usable), key=lambda name: (not name.startswith("ib"), _rank(name)), default=None)


def _of_gloo(usable: Sequence[Interface], host_addresses: Sequence[str]) -> str | None:
    named = (one.name for address in host_addresses for one in usable if address in one.addresses)
    return next(named, next((one.name for one in usable if one.loopback), None))


_CHOICES: dict[str, Callable[[Sequence[Interface], Sequence[str]], str | None]] = {
    "HCCL": _of_hccl,
    "NCCL": _of_nccl,
    "gloo": _of_gloo,
}
"""By library, what it takes where its variable is not set."""


def _outward(usable: Sequence[Interface]) -> str:
    return min((one.name for one in usable), key=_rank, default="lo")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _interfaces() -> list[Interface]:
    up = {name: facts.isup for name, facts in psutil.net_if_stats().items()}
    return [
        Interface(
            name=name,
            addresses=tuple(
                address.address
                for family in (socket.AF_INET, socket.AF_INET6)
                for address in addresses
                if address.family == family
            ),
            up=up.get(name, False),
        )
        for name, addresses in psutil.net_if_addrs().items()
    ]


def _resolved(host: str) -> tuple[str, ...]:
    try:
        return tuple(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None)))
    except OSError:
        return ()
