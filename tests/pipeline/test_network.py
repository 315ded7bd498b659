"""Which interface HCCL, NCCL and gloo would take, and what is said where that cannot work."""

import pytest
from torch.distributed import ProcessGroupGloo

from mmpeft.pipeline.doctor import judge_limits
from mmpeft.pipeline.network import Interface, judge_network, look_at_network

LO = Interface(name="lo", addresses=("127.0.0.1",))
DOCKER = Interface(name="docker0", addresses=("172.17.0.1",))
ETH = Interface(name="eth0", addresses=("10.0.0.1", "fe80::1%eth0"))
ENP = Interface(name="enp1", addresses=("10.1.0.1",))
IB = Interface(name="ib0", addresses=("10.2.0.1",))
DOWN = Interface(name="eth9", addresses=("10.9.0.1",), up=False)
ALL = [LO, DOCKER, ETH, ENP, DOWN]


def judge(interfaces=ALL, host_addresses=("10.0.0.1",), **environment):
    return judge_network(interfaces, host="node7", host_addresses=host_addresses, environment=environment)


def test_without_variables_each_takes_its_own_kind():
    found = judge()
    assert found.chosen == {"HCCL": "enp1", "NCCL": "eth0", "gloo": "eth0"}
    assert found.broken == found.warnings == ()
    assert [one.name for one in found.interfaces] == ["lo", "docker0", "eth0", "enp1"]
    assert judge([*ALL, IB]).chosen["NCCL"] == "ib0"
    assert judge([LO, DOCKER]).chosen["HCCL"] == "docker0"


@pytest.mark.parametrize(
    ("setting", "taken"),
    [("eth,enp", "eth0"), ("=enp1", "enp1"), ("^lo,docker,eth", "enp1"), ("^=lo,docker0", "eth0"), ("eth9", None)],
)
@pytest.mark.parametrize("library", ["HCCL", "NCCL"])
def test_a_pattern_is_read_as_the_library_reads_it(library, setting, taken):
    found = judge(**{f"{library}_SOCKET_IFNAME": setting})
    assert found.chosen[library] == taken
    assert bool(found.broken) == (taken is None)
    assert all("lo, docker0, eth0, enp1; set it to one of them, or unset it" in line for line in found.broken)


def test_gloo_wants_whole_names():
    assert judge(GLOO_SOCKET_IFNAME="enp1").chosen["gloo"] == "enp1"
    assert judge(GLOO_SOCKET_IFNAME="enp").broken[0].startswith("GLOO_SOCKET_IFNAME=enp names no network interface")


def test_an_address_goes_before_a_name():
    assert judge(HCCL_IF_IP="10.0.0.1", HCCL_SOCKET_IFNAME="enp").chosen["HCCL"] == "eth0"
    assert "HCCL_IF_IP=10.7.7.7 is no address of this machine" in judge(HCCL_IF_IP="10.7.7.7").broken[0]


def test_what_keeps_machines_apart_is_named():
    found = judge(host_addresses=())
    assert "'node7', does not resolve: gloo falls back on the loopback" in found.warnings[0]
    assert found.chosen["gloo"] == "lo"
    [line] = judge(host_addresses=("127.0.1.1",)).warnings
    assert "resolves to 127.0.1.1 alone: gloo takes the loopback" in line
    assert line.endswith("GLOO_SOCKET_IFNAME=eth0")
    assert not judge(host_addresses=("127.0.1.1",), GLOO_SOCKET_IFNAME="eth0").warnings
    [line] = judge([LO]).warnings
    assert line.startswith("the only network interface is the loopback")


def test_gloo_takes_each_interface_that_is_found_here_and_none_that_is_not():
    for one in look_at_network().interfaces:
        assert ProcessGroupGloo.create_device(interface=one.name)
    with pytest.raises(RuntimeError, match="Unable to find address for: nowhere0"):
        ProcessGroupGloo.create_device(interface="nowhere0")


def test_limits():
    assert judge_limits(8 << 30, 65536, {}) == judge_limits(None, -1, {"WORLD_SIZE": "10000"}) == []
    [line] = judge_limits(64 << 20, 1024, {})
    assert line.startswith("/dev/shm holds 64.0 MiB")
    assert "--shm-size=8g" in line
    [line] = judge_limits(8 << 30, 1024, {"WORLD_SIZE": "10000"})
    assert "may open 1024 files, and 11023 may be needed" in line
    assert line.endswith("ulimit -n 65536")
