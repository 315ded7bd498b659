"""Frozen towers that nobody runs, out of the accelerator's memory: their weights wait in that of the host."""

from typing import Any

import torch
from transformers import PreTrainedModel

from mmpeft.families.registry import family_of
from mmpeft.models.base import base_of


class RestingTowers:
    """The frozen weights of a model's towers, here or on the host.

    Only their numbers move; modules and parameters stay the same objects, so nothing that holds one notices. Buffers
    stay where they are: they are small, and some are made anew from a device that they name.

    Attributes:
        resting: whether they are on the host.
        bytes: what they take.

    Args:
        model: a transformers model, or a `PeftModel` around one. Quantised weights, which have more than their numbers,
            do not rest.
    """

    def __init__(self, model: Any) -> None:
        base = base_of(model)
        spec = family_of(base)
        # transformers takes the place of a model's first weight for that of the model, also in forwards.
        models = [module for module in base.modules() if isinstance(module, PreTrainedModel)]
        first = {id(next(module.parameters(), None)) for module in models}
        self._weights = [
            weight
            for name, weight in base.named_parameters()
            if spec.part_of(name) in ("vision", "audio")
            and type(weight) is torch.nn.Parameter
            and weight.is_floating_point()
            and not weight.is_meta
            and not weight.requires_grad
            and id(weight) not in first
        ]
        self._homes: list[torch.device] = []
        self.bytes = sum(weight.nbytes for weight in self._weights)

    @property
    def resting(self) -> bool:
        """Whether they are on the host."""
        return bool(self._homes)

    def rest(self) -> None:
        """Let them wait on the host."""
        if not self.resting:
            self._homes = [weight.device for weight in self._weights]
            for weight in self._weights:
                weight.data = weight.data.to("cpu")

    def wake(self) -> None:
        """Bring them back to where they were."""
        for weight, home in zip(self._weights, self._homes, strict=False):
            weight.data = weight.data.to(home)
        self._homes = []
