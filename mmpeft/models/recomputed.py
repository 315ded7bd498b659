"""Activation checkpointing of some of a model's layers, and no more than memory asks for.

    kept         h  h  h  h  h  h  h  h      all that each layer computed waits for its backward
    recomputed   .  .  .  h  h  h  h  h      of the first layers their inputs alone; the rest is computed again

The first layers are the last in backward: when they are computed again, what the later ones kept is gone already.
Layers of towers that train come before those of the language model; behind a frozen tower there is no backward.
"""

import functools
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpeft.models.base import base_of


class RecomputedLayers:
    """The layers that can be recomputed, of which none is at first: the language model's, and of towers what trains.

    Attributes:
        layers: in the order of the forward; none where the model's are of another kind, or checkpointed already.
        count: those from the first that are recomputed.

    Args:
        model: a transformers model, or a `PeftModel` around one.
    """

    def __init__(self, model: Any) -> None:
        base = base_of(model)
        own = list(getattr(base.get_decoder(), "layers", ()))
        known = all(isinstance(layer, GradientCheckpointingLayer) for layer in own)
        towers = [
            layer
            for layer in base.modules()
            if isinstance(layer, GradientCheckpointingLayer)
            and layer not in own
            and any(weight.requires_grad for weight in layer.parameters())
        ]
        layers = [*towers, *own]
        taken = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        self.layers: list[Any] = layers if known and not taken else []
        self.count = 0

    def recompute(self, count: int) -> None:
        """Recompute so many layers; 0: as they were."""
        for number, layer in enumerate(self.layers):
            if number < count:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
            elif "gradient_checkpointing" in vars(layer):
                del layer.gradient_checkpointing, layer._gradient_checkpointing_func
        self.count = count
