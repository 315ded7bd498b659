"""What goes through linear layers while a model reads samples: inputs, and what exports do to outputs."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmpeft.export.coarse import Coarse
from mmpeft.export.w8a8 import inputs_through_int8, through_int8


@dataclass
class Observed:
    """Of one linear layer.

    Attributes:
        largest: float32 [in], the largest |x| of each input channel.
        wrong: sum of squares of what an export would change in its outputs.
        right: sum of squares of its outputs, without bias.
    """

    largest: torch.Tensor
    wrong: float = 0.0
    right: float = 0.0

    @property
    def error(self) -> float:
        """What an export changes in its outputs, relative to them (norms)."""
        return (self.wrong / self.right) ** 0.5 if self.right else 0.0


def observe(
    model: nn.Module,
    linears: Iterable[str],
    batches: Iterable[Mapping[str, Any]],
    coarse: Coarse | None = None,
) -> dict[str, Observed]:
    """Let a model read batches, and watch linear layers.

    Args:
        model: the whole model; in evaluation mode.
        linears: their names in it.
        batches: what its forward takes; without padding, which would be watched as well.
        coarse: how an export computes them; None: its errors are not measured.
    """
    with watching(model, linears, coarse) as found, torch.no_grad():
        for batch in batches:
            model(**batch)
    return found


@contextlib.contextmanager
def watching(model: nn.Module, linears: Iterable[str], coarse: Coarse | None = None) -> Iterator[dict[str, Observed]]:
    """While it lasts, what goes through these linear layers is added up; yields it by name."""
    found: dict[str, Observed] = {}
    with contextlib.ExitStack() as stack:
        for name in linears:
            layer: Any = model.get_submodule(name)
            found[name] = Observed(torch.zeros(layer.in_features, device=layer.weight.device))
            watch = _Watch(name, found[name], coarse)
            stack.callback(layer.register_forward_hook(watch).remove)
        yield found


class _Watch:
    def __init__(self, name: str, found: Observed, coarse: Coarse | None) -> None:
        self.name, self.found, self.coarse = name, found, coarse

    def __call__(self, layer: Any, inputs: Any, output: torch.Tensor) -> None:
        [x] = inputs
        found = self.found
        torch.maximum(found.largest, x.detach().float().abs().flatten(0, -2).amax(0), out=found.largest)
        if self.coarse is not None:
            right = output if layer.bias is None else output - layer.bias
            ours = self.coarse(self.name, layer, x)
            found.wrong += float((ours.float() - right.float()).square().sum())
            found.right += float(right.float().square().sum())


@contextlib.contextmanager
def simulated(
    model: nn.Module, linears: Iterable[str], *, largest: Mapping[str, float] | None = None
) -> Iterator[None]:
    """While it lasts, these linear layers compute as they will when they are quantized, activations included.

    Args:
        model: the whole model.
        linears: their names in it.
        largest: of static activations, by name the largest |x| that scales a layer's inputs; None: by token.
    """
    with contextlib.ExitStack() as stack:
        for name in linears:
            layer: Any = model.get_submodule(name)
            stack.callback(setattr, layer.weight, "data", layer.weight.data)
            layer.weight.data = through_int8(layer.weight.data)
            stack.callback(layer.register_forward_pre_hook(_passing(name, largest)).remove)
        yield


def _passing(name: str, largest: Mapping[str, float] | None) -> Any:
    return lambda layer, inputs: (inputs_through_int8(inputs[0], name, largest), *inputs[1:])
