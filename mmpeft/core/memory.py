"""How much memory this process uses, how much it has used at most, and how much there is."""

import contextlib
import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_earlier: list[int] = [0]
"""The highest peak that was forgotten."""


def peak_memory_bytes(device_type: str) -> int:
    """Peak memory in bytes since the process began: of the accelerator, or resident memory where there is none.

    A CPU's figure is `ru_maxrss` of getrusage(2): KiB on Linux, bytes on macOS.
    """
    return max(_earlier[0], latest_peak_bytes(device_type))


def latest_peak_bytes(device_type: str) -> int:
    """Peak memory in bytes since it was last forgotten."""
    if _accelerated(device_type):
        # Of the device's own module, which each backend has in every version; torch.accelerator has it since torch 2.9.
        return int(torch.get_device_module(device_type).max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device_type: str) -> bool:
    """Count the latest peak anew from here; False where the system has no way to.

    Linux does it by a 5 in /proc/self/clear_refs (proc(5), since Linux 4.0).
    """
    highest = peak_memory_bytes(device_type)
    if _accelerated(device_type):
        torch.get_device_module(device_type).reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
    _earlier[0] = highest
    return True


def memory_in_use(device_type: str) -> int:
    """Bytes that this process has of the device's memory now: tensors of an accelerator, else resident memory."""
    if _accelerated(device_type):
        return int(torch.get_device_module(device_type).memory_allocated())
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return latest_peak_bytes(device_type)
    return pages * os.sysconf("SC_PAGE_SIZE")


def total_memory(device_type: str) -> int:
    """Bytes of the device; of a CPU those of the machine, or of the control group that this process is limited to."""
    if _accelerated(device_type):
        return int(torch.get_device_module(device_type).get_device_properties(0).total_memory)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(whole, _group_limit("memory.max", "memory/memory.limit_in_bytes") or whole)


def available_memory(device_type: str) -> int:
    """Bytes that this process could still take: free ones of an accelerator, else what Linux calls available."""
    if _accelerated(device_type):
        return int(torch.get_device_module(device_type).mem_get_info()[0])
    found = total_memory(device_type)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        found = min(found, int(line.split()[1]) * 1024)
    limit = _group_limit("memory.max", "memory/memory.limit_in_bytes")
    used = _group_limit("memory.current", "memory/memory.usage_in_bytes")
    return min(found, max(0, limit - used)) if limit and used else found


def _group_limit(*names: str) -> int | None:
    """A number of this process's control group, of version 2 or 1; None where there is none."""
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            found = int((Path("/sys/fs/cgroup") / name).read_text(encoding="ascii"))
            # Version 1 writes the largest number of pages for "no limit".
            return found if found < 1 << 60 else None
    return None


def _accelerated(device_type: str) -> bool:
    return device_type != "cpu" and torch.accelerator.is_available()


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """While it lasts, large blocks of host memory go back to the system when they are freed (glibc; elsewhere no-op).

    Else glibc keeps them for blocks of their size: where large tensors are made, cut up and dropped one after another,
    small pieces come to lie between them, and the process grows to what all of them took.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 18)
    try:
        yield
    finally:
        # Where glibc's own adjustment ends, which the first call has switched off.
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)


_M_MMAP_THRESHOLD = -3
"""Of mallopt(3)."""
