"""What the simulation has seen of a program. The real torch-npu has no such module.

With NPU_SIM_REPORT each process writes it there when it ends, as PATH.<rank>.json.
"""

import atexit
import collections
import json
import os
import sys

import torch

from torch_npu.extension import device
from torch_npu.hccl import found as hccl_found

_reads = collections.Counter()
_HERE = os.path.dirname(os.path.abspath(__file__))


def operators():
    """How often each operator was asked for: {"aten::mm": 3}. The simulation computed each on the CPU."""
    return device.operators()


def transfers():
    """Copies, by kind: "write" and "write pinned" to the device, "on the device", and "read ..." of it by the host."""
    return device.transfers()


def reads():
    """Where the host waited for the device: {(what, line of mmpeft, innermost line, in a training step): count}."""
    return dict(_reads)


def hazards():
    """Where streams did not wait for each other: {"used before it was written": 1}."""
    return device.hazards()


def found_at_first():
    """Variables that the device found when it was first used, and whether algorithms were "deterministic"."""
    return device.found_at_first()


def forget():
    """Begin anew."""
    device.forget()
    _reads.clear()


def watch_reads():
    """From here on `reads` knows the lines."""
    device.on_read(_saw)


def set_memory_limit(count):
    """Bytes that a device has."""
    device.set_memory_limit(count)


def _saw(what):
    # Backward runs in a thread of its own, where Python may have no lines.
    lines, frame = [], sys._getframe()
    while frame is not None:
        lines.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    lines = [each for each in lines if not each[0].startswith(_HERE)]
    ours = [each for each in lines if "/mmpeft/" in each[0] and "/site-packages/" not in each[0]]
    step = not lines or any(name == "training_step" for _, _, name in lines)
    _reads[(what, _short(ours[:1]), _short(lines[:1]), step)] += 1


def _short(lines):
    return "; ".join(f"{'/'.join(path.split('/')[-2:])}:{line} {name}" for path, line, name in lines)


def report():
    """All of it, as JSON can hold it."""
    keys = ("what", "mmpeft", "line", "training_step")
    return {
        "operators": operators(),
        "transfers": transfers(),
        "reads": [dict(zip(keys, key, strict=True)) | {"count": count} for key, count in _reads.items()],
        "hazards": hazards(),
        "found_at_first": found_at_first(),
        "hccl_found": dict(hccl_found),
        "peak_bytes": torch.npu.max_memory_allocated(),
        "bytes": torch.npu.memory_allocated(),
    }


def start():
    """If the environment asks for it, a report at the end."""
    if path := os.environ.get("NPU_SIM_REPORT"):
        watch_reads()
        atexit.register(_write, path)


def _write(path):
    if not operators():
        return
    with open(f"{path}.{os.environ.get('RANK', '0')}.json", "w", encoding="utf-8") as file:
        json.dump(report(), file, indent=1)
