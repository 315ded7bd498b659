"""What is installed here, what can be decoded, and what is broken: the facts that `mmpeft doctor` prints."""

import importlib
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmpeft.core.torchvision import built_for_other_torch

LIBRARIES = (
    "mmpeft",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "torchvision",
    "av",
    "soundfile",
    "soxr",
    "torch-npu",
    "deepspeed",
)
REQUIRED = ("torch", "transformers", "peft", "accelerate")
OPTIONAL = ("torchvision", "av", "soundfile", "soxr")

DECODERS = {
    "pictures": (("PIL",), ""),
    "video": (("av", "torchvision"), "video"),
    "audio": (("soundfile", "soxr", "av"), "audio"),
}
"""By kind of media: the modules that decode it and ready it for a model, and the extra that brings them."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found.

    Attributes:
        versions: by library; None where it is not installed.
        devices: names of the devices that torch sees, the CPU first.
        memory_bytes: main memory; None where the system does not say.
        disk_free_bytes: free on the disk of the current directory.
        media: by kind of media, "" if it can be decoded, else why not and what to do.
        warnings: what works around a fault, or is worth knowing; with what to do.
        broken: what does not work at all; with what to do.
    """

    versions: dict[str, str | None]
    devices: tuple[str, ...]
    memory_bytes: int | None
    disk_free_bytes: int
    media: dict[str, str]
    warnings: tuple[str, ...] = ()
    broken: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this installation and this machine; imports what it reports on."""
    versions = {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}
    # What is installed but does not import is broken; an optional one that is not installed is merely not there.
    # The optional ones come first: transformers imports some of them, and then fails for their sake.
    there = [name for name in OPTIONAL if versions[name] is not None]
    faults = {name: fault for name in (*there, *REQUIRED) if (fault := _fault(name))}
    warnings: tuple[str, ...] = ()
    if built_for_other_torch():
        warnings = (
            f"torchvision {versions['torchvision']} is a CUDA build, beside torch {versions['torch']}, a CPU build: "
            "its compiled operators cannot load. mmpeft works in spite of it where it is imported before transformers; "
            "other programs do not (plain transformers, peft; `accelerate launch` beside timm: use torchrun); "
            "to mend it, install the CPU build: pip install torchvision --index-url "
            "https://download.pytorch.org/whl/cpu",
        )
    return Diagnosis(
        versions=versions,
        devices=_devices(),
        memory_bytes=_memory(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        media={kind: _lacking(*needs) for kind, needs in DECODERS.items()},
        warnings=warnings,
        broken=tuple(
            f"{name} {versions[name] or '(not installed)'} does not import: {fault}; "
            f"run: pip install --force-reinstall {name}"
            for name, fault in faults.items()
        ),
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _fault(module: str) -> str:
    """Why a module does not import, or ""."""
    try:
        importlib.import_module(module)
    # A compiled library that does not fit raises RuntimeError, OSError or ImportError; each is what is asked for here.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _lacking(modules: tuple[str, ...], extra: str) -> str:
    lacking = [module for module in modules if _fault(module)]
    return f"{', '.join(lacking)} missing; run: pip install 'mmpeft[{extra}]'" if lacking else ""


def _devices() -> tuple[str, ...]:
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ("cpu",)
    module = torch.get_device_module(found)
    return ("cpu", *(f"{found.type}:{index} {module.get_device_name(index)}" for index in range(module.device_count())))


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
