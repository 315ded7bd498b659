"""What is installed here, what can be decoded and reached, what is broken: the facts that `mmpeft doctor` prints."""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mmpeft.core.torchvision import built_for_other_torch
from mmpeft.core.units import size
from mmpeft.models.devices import pick_device
from mmpeft.pipeline.device_settings import device_settings
from mmpeft.pipeline.drivers import devices, driver_versions, hidden_devices
from mmpeft.pipeline.known_bad import known_bad, unmet
from mmpeft.pipeline.network import Network, look_at_network

if sys.platform != "win32":
    import resource

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
OPTIONAL = ("torchvision", "av", "soundfile", "soxr", "torch-npu")

SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm below which a loader's workers may not get their batches across; containers have 64 MiB if nobody
asks for more."""

OPEN_FILES = 1024
"""Files that a process may open, below which a loader's workers may not get their tensors across."""

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
        versions: by library, driver and toolkit; None where it is not there.
        devices: names of the devices that torch sees, the CPU first.
        device_memory_bytes: by device, its own memory, where torch says so.
        memory_bytes: main memory; None where the system does not say.
        disk_free_bytes: free on the disk of the current directory.
        shared_memory_bytes: of /dev/shm, by which a loader's workers hand batches over; None where there is none.
        open_files: how many a process may open; -1 for no limit.
        settings: variables that a run on the device `auto` has, set by it or by the environment.
        network: interfaces, and which of them HCCL, NCCL and gloo would take.
        media: by kind of media, "" if it can be decoded, else why not and what to do.
        warnings: what works around a fault, or is worth knowing; with what to do.
        broken: what does not work at all; with what to do.
    """

    versions: dict[str, str | None]
    devices: tuple[str, ...]
    memory_bytes: int | None
    disk_free_bytes: int
    media: dict[str, str]
    network: Network
    device_memory_bytes: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    shared_memory_bytes: int | None = None
    open_files: int = -1
    warnings: tuple[str, ...] = ()
    broken: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The same as one JSON object."""
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this installation and this machine; imports what it reports on."""
    libraries = {"python": platform.python_version(), **installed(LIBRARIES)}
    versions = libraries | driver_versions()
    found, network = devices(), look_at_network()
    warnings, broken = _judge_versions(versions)
    for fatal, line in hidden_devices(versions):
        (broken if fatal else warnings).append(line)
    shared_memory = _shared_memory()
    open_files = -1 if sys.platform == "win32" else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return Diagnosis(
        versions=versions,
        devices=tuple(device.name for device in found),
        device_memory_bytes={one.name: one.memory_bytes for one in found if one.memory_bytes is not None},
        settings=device_settings(pick_device()),
        memory_bytes=_memory(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        shared_memory_bytes=shared_memory,
        open_files=open_files,
        network=network,
        media={kind: _lacking(*needs) for kind, needs in DECODERS.items()},
        warnings=(*warnings, *network.warnings, *judge_limits(shared_memory, open_files, os.environ)),
        broken=(*broken, *network.broken),
    )


def _judge_versions(versions: dict[str, str | None]) -> tuple[list[str], list[str]]:
    """Warnings, and what is broken."""
    # What is installed but does not import is broken; an optional one that is not installed is merely not there.
    # The optional ones come first: transformers imports some of them, and then fails for their sake.
    there = [name for name in OPTIONAL if versions[name] is not None]
    faults = {name: fault for name in (*there, *REQUIRED) if (fault := _fault(name.replace("-", "_")))}
    broken = [
        f"{name} {versions[name] or '(not installed)'} does not import: {fault}; "
        f"run: pip install --force-reinstall {name}"
        for name, fault in faults.items()
    ]
    warnings = []
    if built_for_other_torch():
        warnings.append(
            f"torchvision {versions['torchvision']} is a CUDA build, beside torch {versions['torch']}, a CPU build: "
            "its compiled operators cannot load. mmpeft works in spite of it where it is imported before transformers; "
            "other programs do not (plain transformers, peft; `accelerate launch` beside timm: use torchrun); "
            "to mend it, install the CPU build: pip install torchvision --index-url "
            "https://download.pytorch.org/whl/cpu"
        )
    for row in known_bad(versions):
        (broken if row.broken else warnings).append(row.describe(versions))
    for name, line in unmet(versions):
        # Others' bounds are often wider or narrower than what works; ours are what was tested.
        (broken if name == "mmpeft" else warnings).append(line)
    return warnings, broken


def judge_limits(shared_memory: int | None, open_files: int, environment: Mapping[str, str]) -> list[str]:
    """What a loader's workers and the first process of many lack.

    Args:
        shared_memory: bytes of /dev/shm; None where there is none.
        open_files: how many a process may open; -1 for no limit.
        environment: its WORLD_SIZE says how many processes a launcher has started.
    """
    found = []
    if shared_memory is not None and shared_memory < SHARED_MEMORY:
        found.append(
            f"/dev/shm holds {size(shared_memory)}: a loader's workers hand batches over in it, and end with a bus "
            "error when it is full; start the container with --shm-size=8g or --ipc=host, or set data.workers: 0"
        )
    # The first process keeps a connection to each of the others.
    needed = OPEN_FILES + int(environment.get("WORLD_SIZE", "1")) - 1
    if 0 <= open_files < needed:
        found.append(
            f"a process may open {open_files} files, and {needed} may be needed ({OPEN_FILES} for a loader's workers, "
            f"one for each other process); run: ulimit -n {max(65536, 2 * needed)}"
        )
    return found


def installed(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of libraries by name; None for one that is not installed."""
    return {name: _version(name) for name in names}


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


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _shared_memory() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None
