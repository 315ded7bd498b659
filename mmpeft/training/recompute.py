"""Micro-batches that run again with more layers recomputed where memory did not suffice for them."""

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from mmpeft.models.recomputed import RecomputedLayers

logger = logging.getLogger(__name__)

_PARTS = 4
"""Each time memory does not suffice, so large a part of the layers more is recomputed."""

ADVICE = (
    "memory does not suffice for this micro-batch: make batch.micro or batch.tokens smaller (the result stays the "
    "same), data.max_pixels or data.max_length smaller, or use dtype: bfloat16; on several processes, "
    "compute.checkpointing: true"
)

_Result = TypeVar("_Result")


class Recompute:
    """Lets memory say how many layers are recomputed.

    A step's samples come largest first (`batch.balance`), so how many is settled at the first micro-batch, where
    nothing has been computed that could be lost.

    Attributes:
        count: layers that are recomputed, or were when the training ended.
        total: layers that can be; 0 before training, and for models of another kind.
    """

    def __init__(self) -> None:
        self.count = self.total = 0
        self._layers: RecomputedLayers | None = None

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """While it lasts, micro-batches of this model may run again; then its layers are as they were."""
        self._layers = layers = RecomputedLayers(model)
        self.count, self.total = 0, len(layers.layers)
        try:
            yield
        finally:
            layers.recompute(0)
            self._layers = None

    def run(self, model: Any, micro_batch: Callable[[], _Result]) -> _Result:
        """The micro-batch's result.

        Raises:
            RuntimeError: that of the device; memory does not suffice with all layers recomputed either, or gradients
                of micro-batches before this one would be lost.
        """
        if self._layers is None or self.count == self.total:
            with _advising():
                return micro_batch()
        before = _random_states()
        while True:
            trained = [weight for weight in model.parameters() if weight.requires_grad]
            fresh = all(weight.grad is None for weight in trained)
            try:
                return micro_batch()
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if self.count == self.total or not fresh:
                    error.add_note(ADVICE)
                    raise
            # Behind the handler, whose error holds on to what the micro-batch computed.
            for weight in trained:
                weight.grad = None
            # The same dropout again.
            _restore(before)
            gc.collect()
            clear_device_cache()
            self.count = min(self.total, self.count + math.ceil(self.total / _PARTS))
            self._layers.recompute(self.count)
            logger.warning(
                "memory does not suffice; %d of %d layers are now computed again in the backward, which takes less of "
                "it and more time (compute.checkpointing: false ends the run instead)",
                self.count,
                self.total,
            )


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    """Let an error for want of memory say what to do."""
    try:
        yield
    except RuntimeError as error:
        if should_reduce_batch_size(error):
            error.add_note(ADVICE)
        raise


def _random_states() -> list[torch.Tensor]:
    """Of the CPU, and of the accelerator that is used."""
    device = torch.accelerator.current_accelerator()
    module: Any = getattr(torch, device.type) if device is not None else None
    return [torch.get_rng_state(), *([module.get_rng_state()] if hasattr(module, "get_rng_state") else [])]


def _restore(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    device = torch.accelerator.current_accelerator()
    if device is not None and len(states) > 1:
        getattr(torch, device.type).set_rng_state(states[1])
