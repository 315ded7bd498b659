"""What stands under torch: drivers and toolkits, by the files in which they say their versions, and devices."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_NVIDIA = Path("/proc/driver/nvidia/version")
_ASCEND_DRIVER = Path("/usr/local/Ascend/driver/version.info")
_TOOLKITS = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
"""Where CANN lies by default: from 8.5 on, and before; `set_env.sh` names another place in ASCEND_TOOLKIT_HOME."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device as torch sees it.

    Attributes:
        name: "cuda:0 NVIDIA H100"; "cpu" for the processor.
        memory_bytes: its own memory; None where torch does not say.
    """

    name: str
    memory_bytes: int | None = None


def devices() -> tuple[Device, ...]:
    """The CPU, and the accelerators that torch sees."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return (Device(name="cpu"),)
    module = torch.get_device_module(found)
    return (
        Device(name="cpu"),
        *(
            Device(
                name=f"{found.type}:{index} {module.get_device_name(index)}",
                memory_bytes=getattr(module.get_device_properties(index), "total_memory", None),
            )
            for index in range(module.device_count())
        ),
    )


def driver_versions() -> dict[str, str | None]:
    """Versions of what torch stands on; None where it is not there, or does not say."""
    return {
        "CUDA": torch.version.cuda,
        "NVIDIA driver": _in_file(_NVIDIA, r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)"),
        "CANN": _cann(),
        "NPU driver": _in_file(_ASCEND_DRIVER, r"(?im)^version=(\S+)"),
    }


def _cann() -> str | None:
    roots = [os.environ.get("ASCEND_TOOLKIT_HOME"), *_TOOLKITS]
    files = (file for root in roots if root for file in Path(root).glob("*-linux/ascend_toolkit_install.info"))
    return next((found for file in files if (found := _in_file(file, r"(?im)^version=(\S+)"))), None)


def _in_file(path: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def hidden_devices(versions: dict[str, str | None]) -> Iterable[tuple[bool, str]]:
    """Devices that the machine has and torch does not see: whether that is broken, and a line."""
    seen = torch.accelerator.is_available()
    if not seen and versions["NVIDIA driver"] and torch.version.cuda:
        yield (
            True,
            "the machine has an NVIDIA driver and torch is built for CUDA, but torch sees no GPU; see `nvidia-smi`, "
            "and whether CUDA_VISIBLE_DEVICES is empty",
        )
    if not seen and any(Path("/dev").glob("davinci[0-9]*")):
        yield (
            versions.get("torch-npu") is not None,
            "the machine has Ascend NPUs, but torch sees none; "
            + (
                "run `source /usr/local/Ascend/ascend-toolkit/set_env.sh` first, and see `npu-smi info`"
                if versions.get("torch-npu")
                else "run: pip install 'mmpeft[npu]'"
            ),
        )
    if versions.get("torch-npu") and not versions["CANN"]:
        yield (
            True,
            "torch-npu is installed, but no CANN was found; install it, and run "
            "`source /usr/local/Ascend/ascend-toolkit/set_env.sh`, or uninstall torch-npu",
        )
