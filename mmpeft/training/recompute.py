"""Micro-batches that run again, smaller or with more layers recomputed, where memory did not suffice for them."""

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import distributed
from torch.autograd.graph import save_on_cpu

from mmpeft.models.recomputed import RecomputedLayers

logger = logging.getLogger(__name__)

_PARTS = 4
"""Each time memory does not suffice, so large a part of the layers more is recomputed."""

_LITTLE = 0.1
"""Of the model's own size, what gradients of earlier micro-batches may take a second time."""

_NO_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "NPU out of memory",
)
"""Texts of errors that accelerate does not know."""

ADVICE = (
    "memory does not suffice for this micro-batch: make batch.micro or batch.tokens smaller (the result stays the "
    "same), data.max_pixels or data.max_length smaller, or use dtype: bfloat16; on several processes, "
    "compute.checkpointing: true"
)

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Cuttable(Generic[_Result]):
    """A micro-batch that can be cut into smaller ones.

    Attributes:
        most: how many: its samples.
        pieces: given a number from two to `most`, so many of them; their results and gradients add up to its own.
    """

    most: int
    pieces: Callable[[int], list[Callable[[], _Result]]]


_MicroBatch = tuple[Callable[[], Any], Cuttable[Any] | None]


@dataclass(frozen=True)
class _Step:
    """What a step has run so far, from its first micro-batch on, and the random states before that."""

    random: list[torch.Tensor]
    ran: list[_MicroBatch]


class Recompute:
    """Lets memory say how micro-batches are cut, which layers are recomputed, and where activations wait.

    Each time it does not suffice, the next of these is done, and stays:

        micro-batches      cut in two, again and again, down to one sample     costs that they are read anew
        layers             a quarter of them more is recomputed                 a third more work for all of them
        activations        wait in host memory                                  their way there and back

    A step's samples come largest first (`batch.balance`), so it is mostly settled at the first micro-batch. What
    micro-batches before it gave to the gradients is laid aside while one runs, and added when it has run. Where that
    would take much memory, where whole models train, the step runs again from its first micro-batch instead.

    Attributes:
        parts: micro-batches in the place of one.
        count: layers that are recomputed, or were when the training ended.
        total: layers that can be; 0 before training, and for models of another kind.
        offloads: whether activations wait on the host.
    """

    def __init__(self) -> None:
        self.count = self.total = 0
        self.parts, self.offloads = 1, False
        self._layers: RecomputedLayers | None = None
        self._gradients: _Gradients | None = None
        self._step: _Step | None = None

    @contextlib.contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """While it lasts, micro-batches of this model may run again; then its layers are as they were."""
        self._layers = layers = RecomputedLayers(model)
        self._gradients = _Gradients(model)
        self.count, self.total = 0, len(layers.layers)
        self.parts, self.offloads = 1, False
        try:
            yield
        finally:
            layers.recompute(0)
            self._layers = self._gradients = self._step = None

    def run(
        self,
        micro_batch: Callable[[], _Result],
        cuttable: Cuttable[_Result] | None = None,
        *,
        again: Callable[[], _Result] | None = None,
    ) -> _Result:
        """The micro-batch's result.

        Args:
            cuttable: the same, where it can be cut.
            again: the same for a step that runs again, kept until the next begins: of what is on the host anyway;
                default: `micro_batch`.

        Raises:
            RuntimeError, MemoryError: that of the device; memory does not suffice for one sample with all layers
                recomputed either, or there are gradients of before it was asked to watch, which would be lost.
        """
        gradients = self._gradients
        if gradients is None:
            with advising(ADVICE):
                return self._attempt(micro_batch, cuttable)
        if not gradients.stand():
            self._step = _Step(_random_states(gradients.device), [])
        if self._relief(cuttable) is None:
            with advising(ADVICE):
                result = self._attempt(micro_batch, cuttable)
        else:
            result = self._until_it_suffices(gradients, micro_batch, cuttable)
        if self._step is not None:
            self._step.ran.append((again or micro_batch, cuttable))
        return result

    def _until_it_suffices(
        self, gradients: "_Gradients", micro_batch: Callable[[], _Result], cuttable: Cuttable[_Result] | None
    ) -> _Result:
        device = gradients.device
        aside = gradients.lay_aside()
        step = None if aside else self._step
        before = step.random if step is not None else _random_states(device)
        first: list[_MicroBatch] = []
        while True:
            try:
                with advising(ADVICE):
                    for again in first:
                        self._attempt(*again)
                    result = self._attempt(micro_batch, cuttable)
            except (RuntimeError, MemoryError) as error:
                relief = self._relief(cuttable)
                if relief is None or not (aside or step is not None) or not lacks_memory(error):
                    gradients.restore()
                    raise
            else:
                gradients.add()
                return result
            # Behind the handler, whose error holds on to what the micro-batch computed.
            gradients.clear()
            # The same dropout again.
            _restore(before, device)
            gc.collect()
            clear_device_cache()
            relief()
            first = step.ran if step is not None else []

    def agree(self, device: torch.device) -> None:
        """From the next micro-batch on, do as much as that process does which lacked most; each has to ask.

        Steps wait for the slowest anyway, and the records of one process then are those of all.
        """
        if self._layers is None:
            return
        own = torch.tensor([self.parts, self.count, int(self.offloads)], device=device)
        distributed.all_reduce(own, op=distributed.ReduceOp.MAX)
        parts, count, offloads = own.tolist()
        if (parts, count, bool(offloads)) != (self.parts, self.count, self.offloads):
            logger.info("another process lacked memory; micro-batches now run as there")
            self.parts, self.count, self.offloads = parts, count, bool(offloads)
            self._layers.recompute(count)

    def _attempt(self, micro_batch: Callable[[], _Result], cuttable: Cuttable[_Result] | None) -> _Result:
        most = cuttable.most if cuttable is not None else 1
        pieces = cuttable.pieces(min(self.parts, most)) if cuttable is not None and min(self.parts, most) > 1 else []
        with save_on_cpu(pin_memory=True) if self.offloads else contextlib.nullcontext():
            first, *rest = pieces or [micro_batch]
            result: Any = first()
            for piece in rest:
                result = result + piece()
        return cast(_Result, result)

    def _relief(self, cuttable: Cuttable[Any] | None) -> Callable[[], None] | None:
        """What is to be done next where memory does not suffice; None if nothing is left."""
        if self._layers is None or self._gradients is None:
            return None
        if cuttable is not None and 2 * self.parts <= cuttable.most:
            return self._cut
        if self.count < self.total:
            return self._recompute_more
        return None if self.offloads or self._gradients.device.type == "cpu" else self._offload

    def _cut(self) -> None:
        self.parts *= 2
        logger.warning(
            "memory does not suffice; micro-batches are now cut into %d parts, which changes no result "
            "(compute.checkpointing: false ends the run instead)",
            self.parts,
        )

    def _recompute_more(self) -> None:
        assert self._layers is not None
        self.count = min(self.total, self.count + math.ceil(self.total / _PARTS))
        self._layers.recompute(self.count)
        logger.warning(
            "memory does not suffice; %d of %d layers are now computed again in the backward, which takes less of "
            "it and more time (compute.checkpointing: false ends the run instead)",
            self.count,
            self.total,
        )

    def _offload(self) -> None:
        self.offloads = True
        logger.warning(
            "memory does not suffice; activations now wait in host memory for the backward, which takes time "
            "(compute.checkpointing: false ends the run instead)"
        )


class _Gradients:
    """Gradients that stood before a micro-batch, laid aside, so that what it leaves when it fails is told from them.

    Attributes:
        device: of the model.
    """

    def __init__(self, model: Any) -> None:
        weights = list(model.parameters())
        self.device: torch.device = weights[0].device
        self._weights = weights
        self._most = _LITTLE * sum(weight.nbytes for weight in weights)
        self._earlier: list[tuple[Any, torch.Tensor]] | None = None

    def stand(self) -> bool:
        """Whether there are any: not before the first micro-batch of a step."""
        return any(weight.grad is not None for weight in self._weights)

    def lay_aside(self) -> bool:
        """Whether they are; not where they are many: then they stay where they are, and are not to be had back."""
        self._earlier = None
        earlier = [(weight, weight.grad) for weight in self._weights if weight.grad is not None]
        if sum(gradient.nbytes for _, gradient in earlier) > self._most:
            return False
        self._earlier = earlier
        self.clear()
        return True

    def clear(self) -> None:
        """Drop what a micro-batch has left."""
        for weight in self._weights:
            weight.grad = None

    def restore(self) -> None:
        """As they were before the micro-batch, where they were laid aside."""
        if self._earlier is None:
            return
        self.clear()
        for weight, gradient in self._earlier:
            weight.grad = gradient

    @torch.no_grad()
    def add(self) -> None:
        """Add them to what the micro-batch gave: the same sum as if it had been added to them."""
        earlier = self._earlier or []
        both = [(gradient, weight) for weight, gradient in earlier if weight.grad is not None]
        if both:
            torch._foreach_add_([gradient for gradient, _ in both], [weight.grad for _, weight in both])
        for weight, gradient in earlier:
            weight.grad = gradient


def lacks_memory(error: BaseException) -> bool:
    """Whether a device, one of its libraries, or the host had no memory for what was asked."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or should_reduce_batch_size(error) or any(text in str(error) for text in _NO_MEMORY)


@contextlib.contextmanager
def advising(advice: str) -> Iterator[None]:
    """Let an error for want of memory say what to do, unless it does already."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error) and not getattr(error, "__notes__", None):
            error.add_note(advice)
        raise


def _random_states(device: torch.device) -> list[torch.Tensor]:
    """Of the CPU, and of the accelerator that the model is on."""
    module: Any = getattr(torch, device.type, None)
    states = [module.get_rng_state(device)] if device.type != "cpu" and hasattr(module, "get_rng_state") else []
    return [torch.get_rng_state(), *states]


def _restore(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        getattr(torch, device.type).set_rng_state(state, device)
