"""W8A8 in numbers, as compressed-tensors' format `int-quantized` has it: int8 weights, int8 activations as they come.

    weight         int8 [out, in]     round(w / scale), from -128 to 127
    weight_scale   [out, 1]           the row's largest |w| / 127.5, in the precision that the weight had
    input_scale    [1]                static activations alone: their largest |x| / 127.5

Dynamic activations get a scale a token while the model runs, and so have nothing on disk.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

Activations = Literal["dynamic", "static"]

_HALF_RANGE = 127.5
"""Half of the distance from -128 to 127: compressed-tensors' symmetric range."""


def scale_of(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale, in `dtype`, by which numbers up to `largest` become int8; 1 where all are zero."""
    scale = torch.where(largest > 0, largest / _HALF_RANGE, torch.ones_like(largest))
    return scale.to(dtype).clamp_min(torch.finfo(dtype).tiny)


def quantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 of `values`; `scale` broadcasts against them."""
    return (values.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [out, in] of a weight [out, in], and its scales [out, 1] in the weight's precision.

    The scales are rounded first, and the weight is quantized by what is on disk.
    """
    scale = scale_of(weight.float().abs().amax(dim=1, keepdim=True), weight.dtype)
    return quantize(weight, scale), scale


def through_int8(weight: torch.Tensor) -> torch.Tensor:
    """A weight as it is after quantization, in its precision."""
    whole, scale = quantize_rows(weight)
    return (whole.float() * scale.float()).to(weight.dtype)


def tokens_through_int8(x: torch.Tensor) -> torch.Tensor:
    """Activations [..., channels] as dynamic quantization passes them on: a scale a token, in their precision."""
    scale = scale_of(x.float().abs().amax(dim=-1, keepdim=True), x.dtype)
    return (quantize(x, scale).float() * scale.float()).to(x.dtype)


def scaled_through_int8(x: torch.Tensor, largest: float) -> torch.Tensor:
    """Activations as static quantization passes them on: one scale for all, larger ones cut off; in their precision."""
    scale = scale_of(torch.tensor([largest], device=x.device), x.dtype)
    return (quantize(x, scale).float() * scale.float()).to(x.dtype)


def inputs_through_int8(x: torch.Tensor, layer: str, largest: Mapping[str, float] | None) -> torch.Tensor:
    """A linear layer's inputs as quantization passes them on.

    Args:
        layer: its name.
        largest: of static activations, by name the largest |x| that scales a layer's inputs; None: a scale a token.
    """
    return tokens_through_int8(x) if largest is None else scaled_through_int8(x, largest[layer])


def quantization_config(ignore: Sequence[str], *, activations: Activations) -> dict[str, Any]:
    """The block `quantization_config` of a config.json.

    Args:
        ignore: names of linear layers that stay as they are, as the loaded model has them, or `re:` and a pattern.
    """
    kinds: dict[str, dict[str, Any]] = {
        "weights": {"strategy": "channel", "dynamic": False},
        "input_activations": {"strategy": "token", "dynamic": True},
    }
    if activations == "static":
        kinds["input_activations"] = {"strategy": "tensor", "dynamic": False}
    group = {name: {"num_bits": 8, "type": "int", "symmetric": True, **kind} for name, kind in kinds.items()}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": list(ignore),
    }
