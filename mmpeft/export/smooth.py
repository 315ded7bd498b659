"""Outliers of activations moved into weights before both are quantized (SmoothQuant, arXiv:2211.10438).

    norm weight / s  ->  x / s  ->  linear weight * s        s by channel: large where x is large

Each s is a power of two, so that the model computes the same bits before it is quantized, whatever its precision; and
which linear layers read a norm's output is seen by running the model, not by the names of a family.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmpeft.core.errors import ModelError
from mmpeft.export.observe import Observed


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """One norm and what reads its output.

    Attributes:
        norm: its name.
        readers: names of the linear layers that read its output.
        scale: float32 [channels], powers of two.
        offset: what the norm adds to its weight before it multiplies: 1 in Gemma's, else 0.
    """

    norm: str
    readers: tuple[str, ...]
    scale: torch.Tensor
    offset: float

    def on_norm(self, weight: torch.Tensor) -> torch.Tensor:
        """The norm's weight (or bias, without the offset) divided."""
        return ((weight.float() + self.offset) / self.scale - self.offset).to(weight.dtype)

    def on_reader(self, weight: torch.Tensor) -> torch.Tensor:
        """A reader's weight [out, channels] multiplied."""
        return (weight.float() * self.scale).to(weight.dtype)


def smooth(
    model: Any,
    linears: Iterable[str],
    observed: Mapping[str, Observed],
    batch: Mapping[str, Any],
    *,
    strength: float,
    stored: Container[str],
) -> list[Smoothing]:
    """Move outliers from activations into weights, in place.

    Args:
        model: the whole model, in evaluation mode.
        linears: names of those that will be quantized.
        observed: what went through them.
        batch: what its forward takes, to see what reads what and that the model stays the same.
        strength: how much of the difference the weights take, between 0 and 1.
        stored: names of parameters that can be changed on disk as well; norms with others are left alone.

    Raises:
        ModelError: the model computes something else afterwards; it is then of no use.
    """
    groups = _groups(model, batch)
    wanted = set(linears)
    with torch.no_grad():
        before = model(**batch).logits
        done = []
        for norm, readers in groups.items():
            own = [name for name in readers if name in wanted]
            offset = _offset(model.get_submodule(norm))
            if not own or offset is None or any(f"{name}.weight" not in stored for name in (norm, *readers)):
                continue
            largest = torch.stack([observed[name].largest for name in own]).amax(0)
            weights = torch.stack([model.get_submodule(name).weight.float().abs().amax(0) for name in own]).amax(0)
            scale = _powers(largest, weights, strength)
            step = Smoothing(norm=norm, readers=tuple(readers), scale=scale, offset=offset)
            for leaf, values in model.get_submodule(norm).named_parameters():
                values.data = step.on_norm(values.data) if leaf == "weight" else (values / scale).to(values.dtype)
            for name in readers:
                layer = model.get_submodule(name)
                layer.weight.data = step.on_reader(layer.weight.data)
            done.append(step)
        after = model(**batch).logits
    apart = float((after.float() - before.float()).abs().max())
    if apart > 1e-3 * float(before.float().abs().max()):
        raise ModelError(
            f"smoothing changes what {type(model).__name__} computes by {apart:.2g}: something else than linear layers "
            "reads the output of its norms; export without it"
        )
    return done


def _powers(largest: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    scale = largest.clamp_min(1e-5) ** strength / weights.clamp_min(1e-5) ** (1 - strength)
    return torch.exp2(torch.log2(scale).round().clamp(-12, 12))


def _groups(model: Any, batch: Mapping[str, Any]) -> dict[str, list[str]]:
    """By the name of each norm all linear layers that read its output; none if anything else could."""
    outputs: dict[int, tuple[str, torch.Tensor]] = {}
    readers: dict[str, list[str]] = {}
    hooks = []

    def leaves(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # Kept, so that no other tensor has its id.
            outputs[id(output)] = (name, output)

        return hook

    def enters(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            found = outputs.get(id(inputs[0])) if inputs else None
            if found is not None:
                readers.setdefault(found[0], []).append(name)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(enters(name)))
        elif "weight" in module._parameters and module.weight is not None and module.weight.dim() == 1:
            hooks.append(module.register_forward_hook(leaves(name)))
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {norm: list(dict.fromkeys(names)) for norm, names in readers.items()}


def _offset(norm: Any) -> float | None:
    """What a norm adds to its weight; None if it does something else with it."""
    probe = torch.linspace(-1, 1, norm.weight.numel(), device=norm.weight.device, dtype=norm.weight.dtype)[None, None]
    kept, bias = norm.weight.data, getattr(norm, "bias", None)
    with torch.no_grad():
        try:
            made = []
            for value in (0.0, 1.0, 2.0):
                norm.weight.data = torch.full_like(kept, value)
                out = norm(probe).float()
                made.append(out if bias is None else out - bias.float())
        finally:
            norm.weight.data = kept
    none, one, two = made
    if torch.allclose(one + one - none, two, atol=1e-2):
        if not none.any():
            return 0.0
        if torch.allclose(none + none, one, atol=1e-2):
            return 1.0
    return None
