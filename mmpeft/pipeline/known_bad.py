"""Versions that do not go together: one table, each row with where it is written.

    {"torch": "==2.9.*", "torchvision": "!=0.24.*"}      bad where each is installed in a version that its text admits

Names are those of packages, and of what `mmpeft.pipeline.drivers` finds beside them: `CANN`, `NPU driver`, `CUDA`,
`NVIDIA driver`, and `python`. What libraries say of one another in their own metadata needs no row: see `unmet`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version


@dataclass(frozen=True, kw_only=True)
class KnownBad:
    """Versions that do not go together.

    Attributes:
        versions: by library the versions that are meant, as in a requirement: "==2.9.*", "<0.14.4".
        reason: what goes wrong.
        fix: what to do.
        source: where it is written; an address.
        broken: whether nothing works with it; else it is only worth a warning.
    """

    versions: Mapping[str, str]
    reason: str
    fix: str
    source: str
    broken: bool = True

    def applies(self, found: Mapping[str, str | None]) -> bool:
        """Whether all of them are there, in versions that are meant."""
        return all(_within(found.get(name), text) for name, text in self.versions.items())

    def describe(self, found: Mapping[str, str | None]) -> str:
        """One line: what was found, what goes wrong, what to do, and where it is written."""
        there = " with ".join(f"{name} {found[name]}" for name in self.versions)
        return f"{there}: {self.reason}; {self.fix} (see {self.source})"


_TORCHVISION = "https://github.com/pytorch/pytorch/wiki/PyTorch-Versions"
_TORCHVISION_OF = {f"2.{minor}": f"0.{minor + 15}" for minor in range(6, 14)}
"""By minor version of torch that of torchvision; up to 2.7 in the wiki, from there on in each wheel's own metadata."""

_ASCEND = "https://gitcode.com/Ascend/pytorch/blob/master/COMPATIBILITY.en.md"
_CANN_OF = {
    "2.12.0": "9.1.0",
    "2.11.0": "9.1.0",
    "2.10.0.post4": "9.1.0",
    "2.9.0.post6": "9.1.0",
    "2.7.1.post8": "9.1.0",
    "2.9.0.post2": "9.0.0",
    "2.8.0.post4": "9.0.0",
    "2.7.1.post4": "9.0.0",
    "2.9.0": "8.5.0",
    "2.8.0.post2": "8.5.0",
    "2.7.1.post2": "8.5.0",
    "2.6.0.post5": "8.5.0",
    "2.8.0": "8.3.RC1",
    "2.7.1": "8.3.RC1",
    "2.6.0.post3": "8.3.RC1",
    "2.6.0": "8.2.RC1",
}
"""By release of torch-npu the CANN that it belongs to; the rows from torch 2.6 on, which mmpeft needs."""

_NVIDIA = "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"
_DRIVER_OF = {"12": "525", "13": "580"}
"""By major version of CUDA the least driver."""


def _minor(release: str) -> str:
    return ".".join(release.split(".")[:2])


KNOWN_BAD: tuple[KnownBad, ...] = (
    *(
        KnownBad(
            versions={"torch": f"=={torch}.*", "torchvision": f"!={vision}.*"},
            reason="torchvision's compiled operators are built for another minor version of torch",
            fix=f"run: pip install 'torchvision=={vision}.*'",
            source=_TORCHVISION,
        )
        for torch, vision in _TORCHVISION_OF.items()
    ),
    *(
        KnownBad(
            versions={"torch-npu": f"=={minor}.*", "torch": f"!={minor}.*"},
            reason="each torch-npu is built for the torch of its own minor version",
            fix=f"run: pip install 'torch=={minor}.*'",
            source=_ASCEND,
        )
        for minor in dict.fromkeys(map(_minor, _CANN_OF))
    ),
    *(
        KnownBad(
            versions={"torch-npu": f"=={release}", "CANN": f"!={cann}"},
            reason=f"this torch-npu was released with CANN {cann}",
            fix=f"install CANN {cann}, or the torch-npu that belongs to this CANN",
            source=_ASCEND,
            broken=False,
        )
        for release, cann in _CANN_OF.items()
    ),
    *(
        KnownBad(
            versions={"CUDA": f"=={cuda}.*", "NVIDIA driver": f"<{driver}"},
            reason=f"CUDA {cuda} needs a driver of {driver} or newer",
            fix="update the driver, or install a torch built for an older CUDA",
            source=_NVIDIA,
        )
        for cuda, driver in _DRIVER_OF.items()
    ),
    KnownBad(
        versions={"python": "<3.11.8"},
        reason="a process that a loader starts can hang for ever, rarely; mmpeft run pauses before each, against that",
        fix="install Python 3.11.8 or newer",
        source="https://github.com/python/cpython/issues/112275",
        broken=False,
    ),
    KnownBad(
        versions={"deepspeed": "<0.14.4", "torch": ">=2.4"},
        reason="deepspeed imports names from torch.distributed.elastic that torch 2.4 has no more",
        fix="run: pip install -U 'mmpeft[deepspeed]'",
        source="https://github.com/deepspeedai/DeepSpeed/issues/5603",
    ),
)
"""What is looked for; a row needs a source that says so, not an experience."""

STATED = {
    "mmpeft": ("deepspeed", "npu", "video"),
    "transformers": ("torch", "deepspeed"),
    "accelerate": (),
    "peft": (),
    "deepspeed": (),
    "torchvision": (),
}
"""Libraries whose own requirements are looked at, and of each the extras that speak of libraries in the table."""


def known_bad(found: Mapping[str, str | None]) -> list[KnownBad]:
    """The rows of the table that apply to these versions, by library; None for one that is not there."""
    return [row for row in KNOWN_BAD if row.applies(found)]


def unmet(found: Mapping[str, str | None]) -> Iterable[tuple[str, str]]:
    """What libraries require of one another by their own metadata and do not have: a library's name, and a line."""
    for name, extras in STATED.items():
        for requirement in _requirements(name, extras) if found.get(name) else ():
            there = found.get(requirement.name)
            if there is None or _within(there, str(requirement.specifier)):
                continue
            yield (
                name,
                f"{name} {found[name]} requires {requirement.name}{requirement.specifier}, and {there} is installed; "
                f"run: pip install '{requirement.name}{requirement.specifier}'",
            )


def _requirements(name: str, extras: Iterable[str]) -> dict[Requirement, None]:
    """Each once: an extra's list holds the others' too."""
    try:
        texts = requires(name) or []
    except PackageNotFoundError:
        return {}
    parsed = [Requirement(text) for text in texts]
    return {
        one: None
        for one in parsed
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras))
    }


def _within(version: str | None, text: str) -> bool:
    """Whether a version is there, can be read, and is one of those that `text` admits."""
    if version is None:
        return False
    try:
        return SpecifierSet(text).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False
