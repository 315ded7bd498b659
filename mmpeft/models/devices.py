"""Where a model is put, and in which precision."""

import importlib
import time

import torch

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of the precisions that weights are loaded in."""


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device by name: "auto" (the accelerator that torch sees, else the CPU), "cpu", "cuda", "npu", "cuda:1".

    Raises:
        ModelError: torch knows no such device, or sees none of that kind here.
    """
    if isinstance(device, str) and device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        if str(device).partition(":")[0] != "npu":
            raise ModelError(
                f"device {device!r} is not known; use auto, cpu, cuda, npu, or one of them as in cuda:1"
            ) from error
        chosen = _npu(str(device))
    if chosen.type not in ("cpu", "meta"):
        _check_available(chosen)
    return chosen


def _npu(device: str) -> torch.device:
    """The NPU, whose name torch learns from torch-npu; it imports that by itself, unless it is told not to."""
    try:
        importlib.import_module("torch_npu")
        return torch.device(device)
    except (ImportError, RuntimeError) as error:
        raise _absent(device) from error


def _check_available(device: torch.device) -> None:
    try:
        module = torch.get_device_module(device)
        count = module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError):
        count = 0
    if count == 0:
        raise _absent(str(device))
    if device.index is not None and device.index >= count:
        raise ModelError(f"device {str(device)!r} was asked for, but torch sees {count}, numbered from 0")


def _absent(device: str) -> ModelError:
    kind = device.partition(":")[0]
    advice = "install mmpeft[npu] and CANN" if kind == "npu" else f"install a torch built for {kind}"
    return ModelError(f"device {device!r} was asked for, but torch sees none; {advice}, or use device='auto'")


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype | str:
    """What `from_pretrained(dtype=...)` takes: a precision, or "auto" for the checkpoint's own.

    None and "auto" mean the checkpoint's own on an accelerator, and float32 on a CPU, where half precision is
    slow and in places not implemented.

    Raises:
        ModelError: the name is not one of `DTYPES`.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is not known{did_you_mean(dtype, ['auto', *DTYPES])}")
    return DTYPES[dtype]


def measured_speed(device: torch.device, *, seconds: float = 0.2, width: int = 768) -> float:
    """FLOP/s of square matrix products in float32 on a device, for about so long."""
    left, right = torch.rand(width, width, device=device), torch.rand(width, width, device=device)
    left @ right
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        (left @ right)[0, 0].item()
        done += 1
    return 2 * width**3 * done / (time.perf_counter() - begin)
