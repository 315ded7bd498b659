"""The language-model head and its loss: at supervised positions alone, and a chunk of positions at a time.

    hidden states  h h h h h h h h       [rows, tokens, width], what comes to the head
    kept                 h h   h h h     positions whose next token is labelled (`logits_to_keep`)
    chunks               h h | h h | h   each: head, cross-entropy, gradient; its logits are then let go

A chunk's gradient is computed together with its loss, since the loss is a sum and its logits are at hand: nothing is
computed twice, and what stays for backward is as large as the hidden states (the way of Liger's fused loss,
arXiv:2410.10989). The sum is divided by the number of labelled tokens outside, so gradients of half precision keep
their range.

`head_loss_on` does this through PyTorch's own hooks, on the model (which loses its labels and gets its loss back) and
on the head; a forward without labels runs as ever.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import slice_logits_to_keep

from mmpeft.core.errors import ModelError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.models.base import base_of
from mmpeft.models.liger import liger_loss, liger_takes

AUTO_ENTRIES = 2**26
"""Positions x vocabulary above which `auto` computes the loss in chunks: 256 MiB in float32, held three times over."""

CHUNK_ENTRIES = 2**24
"""Most positions x vocabulary of a chunk."""


@dataclass(frozen=True)
class Finish:
    """What a model does to its logits after the head.

    Attributes:
        cap: they are bent to stay within it.
        divisor: they are divided by it.
    """

    cap: float | None = None
    divisor: float = 1.0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits as the model gives them."""
        if self.cap is not None:
            return torch.tanh(logits / self.cap) * self.cap
        return logits if self.divisor == 1 else logits / self.divisor


def _as_they_are(config: Any) -> Finish:
    return Finish()


def _capped(config: Any) -> Finish:
    return Finish(cap=getattr(config.get_text_config(), "final_logit_softcapping", None))


def _scaled(config: Any) -> Finish:
    return Finish(divisor=config.logits_scaling)


FINISHES: dict[str, Callable[[Any], Finish]] = {
    "GemmaForCausalLM": _as_they_are,
    "Gemma2ForCausalLM": _capped,
    "Gemma3ForCausalLM": _capped,
    "Gemma3ForConditionalGeneration": _as_they_are,
    "GraniteForCausalLM": _scaled,
    "Idefics3ForConditionalGeneration": _as_they_are,
    "InternVLForConditionalGeneration": _as_they_are,
    "LlamaForCausalLM": _as_they_are,
    "LlavaForConditionalGeneration": _as_they_are,
    "LlavaNextForConditionalGeneration": _as_they_are,
    "LlavaOnevisionForConditionalGeneration": _as_they_are,
    "MistralForCausalLM": _as_they_are,
    "Olmo2ForCausalLM": _as_they_are,
    "PaliGemmaForConditionalGeneration": _capped,
    "Phi3ForCausalLM": _as_they_are,
    "PhiForCausalLM": _as_they_are,
    "Qwen2AudioForConditionalGeneration": _as_they_are,
    "Qwen2ForCausalLM": _as_they_are,
    "Qwen2VLForConditionalGeneration": _as_they_are,
    "Qwen2_5OmniThinkerForConditionalGeneration": _as_they_are,
    "Qwen2_5_VLForConditionalGeneration": _as_they_are,
    "Qwen3ForCausalLM": _as_they_are,
    "Qwen3VLForConditionalGeneration": _as_they_are,
    "Qwen3_5ForConditionalGeneration": _as_they_are,
    "SmolLM3ForCausalLM": _as_they_are,
    "SmolVLMForConditionalGeneration": _as_they_are,
}
"""Classes that hold a head, each tested, and what they do to its logits. Others may do something else."""


@dataclass
class HeadFigures:
    """What the head was spared, in Python's own numbers: counting them needs no synchronisation.

    Attributes:
        positions: tokens that went through the model with labels.
        kept: those of them whose logits were computed.
        chunked: those whose logits never stood in memory together.
        entries: the most positions x vocabulary of a forward.
        largest: the most that stood in memory together.
        liger: whether Liger's kernels computed any.
    """

    positions: int = 0
    kept: int = 0
    chunked: int = 0
    entries: int = 0
    largest: int = 0
    liger: bool = False


@dataclass
class _Task:
    """A forward under way: the loss that it owes."""

    labels: torch.Tensor
    shifted: torch.Tensor | None
    keep: Any
    count: Any
    hidden: torch.Tensor | None = None
    autocast: tuple[bool, torch.dtype] = (False, torch.float32)


def unchunkable(model: Any) -> str | None:
    """Why the loss of `model` cannot be computed in chunks; None if it can."""
    base = base_of(model)
    head = base.get_output_embeddings()
    owner = _owner(base, head) if head is not None else None
    if owner is None:
        return "the model has no language-model head of its own"
    if type(owner).__name__ not in FINISHES:
        return f"what {type(owner).__name__} does to its logits was not tested"
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        return "the balance of the experts' routers is a part of the loss"
    return None


@contextlib.contextmanager
def head_loss_on(
    model: Any,
    *,
    chunked: bool | None = None,
    liger: bool = True,
    auto_entries: int = AUTO_ENTRIES,
    chunk_entries: int = CHUNK_ENTRIES,
) -> Iterator[HeadFigures]:
    """Compute logits where they are supervised only, and, where they are many, in chunks.

    Batches are those of a collator with `supervised_only`, for any first-class family: also those whose forward does
    not know `logits_to_keep`. A forward in chunks gives no logits ([rows, 0, vocabulary]).

    Args:
        model: a transformers model, or a `PeftModel` around one.
        chunked: whether the loss is computed in chunks; None: where positions x vocabulary exceeds `auto_entries`,
            if the model's can be.
        liger: compute chunks by Liger's kernels, where they are installed and take the model's head.
        chunk_entries: most positions x vocabulary of a chunk.

    Yields:
        What was spared so far.

    Raises:
        ModelError: `chunked` is True, but the model's loss cannot be computed so; says why.
    """
    obstacle = unchunkable(model)
    if chunked and obstacle:
        raise ModelError(f"the loss cannot be computed in chunks: {obstacle}; expected one of {', '.join(FINISHES)}")
    least = 0 if chunked else auto_entries
    hooks = _HeadHooks(model, least=None if chunked is False or obstacle else least, chunk=chunk_entries, liger=liger)
    handles = hooks.register()
    try:
        yield hooks.figures
    finally:
        for handle in handles:
            handle.remove()


class _HeadHooks:
    """The hooks, and the forward that they are in."""

    def __init__(self, model: Any, *, least: int | None, chunk: int, liger: bool) -> None:
        base = base_of(model)
        self.model, self.head = model, base.get_output_embeddings()
        self.least, self.chunk, self.liger = least, chunk, liger
        self.takes_indices = "logits_to_keep" in inspect.signature(base.forward).parameters
        self.figures = HeadFigures()
        self.task: _Task | None = None
        owner = _owner(base, self.head) if self.head is not None else None
        make = FINISHES.get(type(owner).__name__)
        self.finish = make(owner.config) if owner is not None and make is not None else Finish()

    def register(self) -> list[RemovableHandle]:
        if self.head is None:
            return []
        return [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True),
            self.head.register_forward_pre_hook(self.at_head),
            self.model.register_forward_hook(self.after),
        ]

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take the labels out of a forward whose loss is computed here; leave any other alone."""
        self.task = None
        labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        if labels is None:
            return None
        kept = len(labels) * len(keep) if isinstance(keep, torch.Tensor) else labels.numel()
        if torch.is_grad_enabled():
            self._count(labels.numel(), kept)
        if not self._chunks(kept) and (self.takes_indices or "logits_to_keep" not in kwargs):
            return None
        kwargs = dict(kwargs)
        kwargs.pop("logits_to_keep", None)
        self.task = _Task(
            labels=kwargs.pop("labels"),
            shifted=kwargs.pop("shift_labels", None),
            keep=keep,
            count=kwargs.pop("num_items_in_batch", None),
        )
        return args, kwargs

    def at_head(self, module: Any, args: tuple[Any, ...]) -> Any:
        """Give the head the supervised positions; where they go in chunks, none, and keep them for later."""
        task = self.task
        if task is None or task.hidden is not None:
            return None
        hidden = slice_logits_to_keep(args[0], task.keep)
        if not self._chunks(hidden[..., 0].numel()):
            return (hidden, *args[1:])
        kind = hidden.device.type
        task.hidden, task.autocast = hidden, (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        return (hidden[:, :0], *args[1:])

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """The model's output with its loss."""
        task, self.task = self.task, None
        if task is None:
            return None
        targets = _targets(task.labels, task.shifted)
        if task.hidden is None:
            logits = output["logits"]
            total = cross_entropy(logits.float().flatten(0, 1), targets.to(logits.device), reduction="sum")
        else:
            enabled, dtype = task.autocast
            with torch.autocast(task.hidden.device.type, dtype=dtype, enabled=enabled):
                total = self._in_chunks(task.hidden.flatten(0, 1), targets.to(task.hidden.device))
        loss = total / ((targets != IGNORE_INDEX).sum().to(total.device) if task.count is None else task.count)
        return type(output)(loss=loss, **{name: value for name, value in output.items() if name != "loss"})

    def _in_chunks(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.liger and self.finish == Finish() and liger_takes(self.head, hidden):
            self.figures.liger = True
            return liger_loss(self.head, hidden, targets)
        rows = max(1, self.chunk // self._vocabulary())
        trained = tuple(weight for weight in self.head.parameters() if weight.requires_grad)
        return _SummedLoss.apply(hidden, targets, lambda chunk: self.finish(self.head(chunk)), rows, *trained)

    def _chunks(self, positions: int) -> bool:
        return self.least is not None and positions * self._vocabulary() > self.least

    def _vocabulary(self) -> int:
        return int(base_of(self.model).config.get_text_config().vocab_size)

    def _count(self, positions: int, kept: int) -> None:
        figures, entries = self.figures, kept * self._vocabulary()
        chunked = self._chunks(kept)
        figures.positions += positions
        figures.kept += kept
        figures.chunked += kept if chunked else 0
        figures.entries = max(figures.entries, entries)
        figures.largest = max(figures.largest, min(entries, self.chunk) if chunked else entries)


class _SummedLoss(torch.autograd.Function):
    """The summed cross-entropy of logits that are computed, and differentiated, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        rows: int,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        """The sum; `hidden` [positions, width], `targets` [positions], `trained` the head's own that train."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = [torch.zeros_like(weight) for weight in trained]
        into = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            chunk = hidden[start : start + rows].detach()
            with torch.set_grad_enabled(any(ctx.needs_input_grad)):
                chunk.requires_grad_(into is not None)
                loss = cross_entropy(logits_of(chunk).float(), targets[start : start + rows], reduction="sum")
            total += loss.detach()
            if not loss.requires_grad:
                continue
            found = torch.autograd.grad(loss, [*([chunk] if into is not None else []), *trained], allow_unused=True)
            if into is not None:
                into[start : start + rows] = found[0]
            for sum_, grad in zip(grads, found[-len(grads) :] if grads else (), strict=True):
                if grad is not None:
                    sum_ += grad
        ctx.save_for_backward(*([into] if into is not None else []), *grads)
        ctx.into = into is not None
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The chunks' gradients, times the one that came."""
        # A gradient scaled for float16 may be beyond its range until it is multiplied.
        saved = [(each.float() * gradient).to(each.dtype) for each in ctx.saved_tensors]
        into = saved.pop(0) if ctx.into else None
        return into, None, None, None, *saved


def _targets(labels: torch.Tensor, shifted: torch.Tensor | None) -> torch.Tensor:
    """[positions]: the token that each position is to predict."""
    if shifted is None:
        shifted = pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    return shifted.flatten()


def _owner(base: Any, head: torch.nn.Module) -> Any:
    """The module that calls the head."""
    return next((module for module in base.modules() if any(child is head for child in module.children())), None)
