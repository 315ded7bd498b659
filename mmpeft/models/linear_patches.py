"""Patches of the Qwen-VL line's towers projected by one matrix product, not by a convolution over each.

Their processors cut pictures into patches, and a Conv3d whose kernel is as large as a patch takes each for an input of
its own; it moves nowhere. So it is a linear layer, for which libraries have far better kernels: 1,024 patches in
bfloat16 on two cores of a Xeon took 145 ms as a convolution, 2 ms as a product. Its weights stay as they are.

    patches [n, channels, time, height, width] -> [n, all of one] @ weight.T [all of one, width] -> [n, width, 1, 1, 1]
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional


@contextlib.contextmanager
def patches_linear(model: torch.nn.Module) -> Iterator[int]:
    """Project patches by a matrix product while it lasts; a convolution that does move over its input goes on so.

    Yields:
        How many layers do.
    """
    layers = [module for module in model.modules() if type(module) is torch.nn.Conv3d and _takes_apart(module)]
    # As attributes of the instances: their calls, and so all hooks, stay.
    owned = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in owned:
        layer.forward = partial(_project, layer)  # type: ignore[method-assign]
    try:
        yield len(owned)
    finally:
        for layer in owned:
            del layer.forward


def _takes_apart(layer: torch.nn.Conv3d) -> bool:
    """Whether it takes its input apart: each stretch as large as its kernel by itself, and whole."""
    whole = layer.padding in ((0, 0, 0), "valid") and layer.dilation == (1, 1, 1) and layer.groups == 1
    return whole and tuple(layer.kernel_size) == tuple(layer.stride)


def _project(layer: torch.nn.Conv3d, patches: torch.Tensor) -> torch.Tensor:
    if patches.shape[1:] != layer.weight.shape[1:]:
        return torch.nn.Conv3d.forward(layer, patches)
    projected = functional.linear(patches.flatten(1), layer.weight.flatten(1), layer.bias)
    return projected[:, :, None, None, None]
