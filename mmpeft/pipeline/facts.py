"""What a run records about where it ran: versions and hardware."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

LIBRARIES = ("mmpeft", "torch", "transformers", "peft", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }


def hardware(device: torch.device) -> str:
    """One line for people: the accelerator's name, or the processor's with its number of usable cores."""
    if device.type != "cpu" and torch.accelerator.is_available():
        module = torch.get_device_module(device.type)
        return f"{module.device_count()} x {module.get_device_name(0)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
