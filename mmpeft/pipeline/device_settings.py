"""Settings that a device reads when it is first used: how memory is reserved, and whether sums come out the same.

They are variables of the environment, which processes that are started later inherit. What is set already stays.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

import torch
from torch.torch_version import TorchVersion

from mmpeft.core.errors import ModelError, RecipeError

logger = logging.getLogger(__name__)

EXPANDABLE = "expandable_segments:True"
"""Let reserved memory grow in place: micro-batches differ in length, and pieces of other lengths would lie idle. Of
torch's CUDA allocator, and of torch-npu's (hiascend.com, PYTORCH_NPU_ALLOC_CONF; Ascend HDK 23.0.0 or newer)."""

REPEATABLE = {
    "cuda": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    "npu": {"HCCL_DETERMINISTIC": "true", "CLOSE_MATMUL_K_SHIFT": "1"},
}
"""By device, what `torch.use_deterministic_algorithms` leaves open: cuBLAS's workspaces (docs.nvidia.com/cuda/cublas,
results reproducibility), sums over NPUs, and in which order an NPU adds in a product (Ascend's MindSpeed sets both)."""

_ANOTHER = {"CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"), "HCCL_DETERMINISTIC": ("true", "strict", "1")}
"""Values of the same effect."""


def device_settings(device: torch.device, *, deterministic: bool = False) -> dict[str, str]:
    """The variables that a run on a device has, those that the environment has already among them.

    Raises:
        RecipeError: one of them says the opposite of `deterministic`.
    """
    names = _ALLOCATORS.get(device.type, ())
    own = next((name for name in names if name in os.environ), None)
    settings = {own: os.environ[own]} if own else {names[0]: EXPANDABLE} if names and _expands(device) else {}
    for name, value in REPEATABLE.get(device.type, {}).items() if deterministic else ():
        settings[name] = os.environ.get(name, value)
        if settings[name].lower() not in _ANOTHER.get(name, (value,)):
            raise RecipeError(
                f"deterministic: the environment has {name}={settings[name]}, with which results differ from run to "
                f"run; unset it, or set it to {value}"
            )
    return settings


def set_device(device: torch.device, *, deterministic: bool = False) -> None:
    """Set them, before a device is first used.

    Raises:
        RecipeError: see `device_settings`.
    """
    missing = {
        name: value
        for name, value in device_settings(device, deterministic=deterministic).items()
        if name not in os.environ
    }
    if missing and torch.get_device_module(device).is_initialized():
        logger.warning(
            "the device was in use before this run; without effect in this process: %s",
            ", ".join(f"{name}={value}" for name, value in missing.items()),
        )
    os.environ.update(missing)


@contextlib.contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """Compute the same bits each time while it lasts, on all devices; to be entered before a device is first used.

    An NPU keeps what it was told when its first operator ran (torch-npu's documentation, deterministic computing).

    Raises:
        ModelError: an operation of the model has no algorithm that does.
    """
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ModelError(
            f"deterministic: {str(error).partition('.')[0]}; leave `deterministic` out, or what asks for it in the "
            "model"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


# torch 2.9 renamed it, and warns of the old name; torch-npu has its own.
_OF_CUDA = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_ALLOCATORS = {
    "cuda": _OF_CUDA if TorchVersion(torch.__version__) >= "2.10" else _OF_CUDA[::-1],
    "npu": ("PYTORCH_NPU_ALLOC_CONF",),
}


def _expands(device: torch.device) -> bool:
    """Whether an allocator is known to take it: not on Windows, nor under ROCm."""
    return sys.platform == "linux" and (device.type != "cuda" or torch.version.hip is None)
