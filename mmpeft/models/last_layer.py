"""The last layer's feed-forward part at supervised positions alone: nothing reads what it makes of the others.

last layer     attention  h h h h h h h h      all tokens, for their keys and values are seen
               feed-forward   h h   h h h      positions whose next token is labelled (`logits_to_keep`)
head                          h h   h h h
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mmpeft.models.base import base_of
from mmpeft.models.context_parallel import ContextParallel
from mmpeft.models.groups import group_of
from mmpeft.models.mask_free import CAUSAL


@dataclass
class LastLayerFigures:
    """What it was spared: tokens that went through the model, and those whose feed-forward part was computed."""

    tokens: int = 0
    kept: int = 0


def last_layer_obstacle(model: Any) -> str | None:
    """Why the last layer computes all positions; None if it need not.

    Only types whose layers are known to end in a feed-forward part that mixes no tokens, and are read by nothing but
    norms and the head.
    """
    text = base_of(model).config.get_text_config().model_type
    if text not in CAUSAL or not isinstance(getattr(_last(model), "mlp", None), torch.nn.Module):
        return f"the last layer of a language model of type {text!r} was not tested with it"
    if isinstance(group_of(model), ContextParallel):
        return "each process has a part of the tokens (distributed.context_parallel)"
    return None


@contextlib.contextmanager
def last_layer_spared(model: Any) -> Iterator[LastLayerFigures]:
    """Compute the last layer's feed-forward part where a batch with labels says `logits_to_keep`.

    To be entered before `head_loss_on`, which takes that away from forwards that do not know it.

    Args:
        model: a transformers model, or a `PeftModel` around one, without `last_layer_obstacle`.

    Yields:
        What was spared so far.
    """
    hooks = _Hooks()
    mlp = _last(model).mlp
    handles = [
        model.register_forward_pre_hook(hooks.before, with_kwargs=True),
        mlp.register_forward_pre_hook(hooks.select),
        mlp.register_forward_hook(hooks.spread),
    ]
    try:
        yield hooks.figures
    finally:
        for handle in handles:
            handle.remove()


class _Hooks:
    """What stays the same from a forward to its backward, in which activation checkpointing runs the layer again."""

    def __init__(self) -> None:
        self.figures = LastLayerFigures()
        self.keep: torch.Tensor | None = None
        self.length = 0

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep = kwargs.get("logits_to_keep") if kwargs.get("labels") is not None else None
        self.keep = keep if isinstance(keep, torch.Tensor) else None
        if self.keep is not None and torch.is_grad_enabled():
            rows, tokens = kwargs["labels"].shape
            self.figures.tokens += rows * tokens
            self.figures.kept += rows * len(self.keep)

    def select(self, module: Any, args: tuple[Any, ...]) -> Any:
        if self.keep is None:
            return None
        self.length = args[0].shape[1]
        return (args[0][:, self.keep], *args[1:])

    def spread(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        if self.keep is None:
            return None
        everywhere = output.new_zeros(len(output), self.length, *output.shape[2:])
        return everywhere.index_copy(1, self.keep, output)


def _last(model: Any) -> Any:
    return base_of(model).get_decoder().layers[-1]
