"""What linear layers compute once an export has their weights: by kind, as its runtime rounds weights and inputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mmpeft.export.w8a8 import inputs_through_int8, through_int8

Coarse = Callable[[str, Any, torch.Tensor], torch.Tensor]
"""Of a layer's name, the layer as the source has it, and inputs [..., in]: outputs [..., out] without bias."""

_MOST = 127


def w8a8(largest: Mapping[str, float] | None = None) -> Coarse:
    """As compressed-tensors does: a scale a row of weights.

    Args:
        largest: of static activations, by name the largest |x| that scales a layer's inputs; None: a scale a token.
    """

    def outputs(name: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs_through_int8(x, name, largest), through_int8(layer.weight))

    return outputs


def in_blocks(size: Callable[[int], int]) -> Coarse:
    """As ONNX Runtime and llama.cpp do: weights, and inputs as they come, with a scale for each so many of them.

    Errors are as large as theirs, if not the same number by number: each rounds scales in its own way.

    Args:
        size: given a layer's input channels, how many of them share a scale.
    """

    def outputs(name: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
        block = size(layer.in_features)
        return nn.functional.linear(through_blocks(x, block), through_blocks(layer.weight, block))

    return outputs


def as_loaded(export: nn.Module) -> Coarse:
    """As the layers of a loaded export do, whose modules have the source's names."""

    def outputs(name: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
        theirs: Any = export.get_submodule(name)
        found: torch.Tensor = theirs(x)
        return found if theirs.bias is None else found - theirs.bias

    return outputs


def through_blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """Numbers [..., channels] as int8 with a scale for each `size` channels has them, in their precision."""
    channels = values.shape[-1]
    blocks = nn.functional.pad(values.float(), (0, -channels % size)).unflatten(-1, (-1, size))
    scale = (blocks.abs().amax(-1, keepdim=True) / _MOST).clamp_min(torch.finfo(torch.float32).tiny)
    return ((blocks / scale).round() * scale).flatten(-2)[..., :channels].to(values.dtype)
