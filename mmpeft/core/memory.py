"""How much memory this process has used at most."""

import resource
import sys

import torch


def peak_memory_bytes(device_type: str) -> int:
    """Peak memory in bytes since the process began: of the accelerator, or resident memory where there is none.

    A CPU's figure is `ru_maxrss` of getrusage(2): KiB on Linux, bytes on macOS.
    """
    if device_type != "cpu" and torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
