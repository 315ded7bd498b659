"""Attention over a row of several samples, some of which share their beginning: exact, and without a square mask.

Every segment sees itself up to each token, and all of the segment that it stands on. It runs segment by segment through
`scaled_dot_product_attention` (those of one length beside each other together), so that what is computed is what the
samples need. Where the device has a kernel for samples of unequal length, the whole row is one call of it
(`mmpeft.models.varlen_attention`).

`tree_attention_on` sets it up through transformers' own registries; a forward without `tree` runs as under "sdpa".
"""

import contextlib
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmpeft.core.errors import ModelError
from mmpeft.core.tree import Segment, Tree
from mmpeft.families.registry import family_of
from mmpeft.models.base import base_of
from mmpeft.models.block_attention import block_attention, blocks_pay
from mmpeft.models.dimensions import head_channels
from mmpeft.models.slots import Seen
from mmpeft.models.varlen_attention import kernel_for, varlen_attention

NAME = "mmpeft_tree"

EXACT = frozenset(
    {
        "gemma",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_5_omni_text",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
        "qwen3",
        "qwen3_vl_text",
        "smollm3",
    }
)
"""Types of language models whose every layer mixes tokens in attention alone and hands `tree` on to it, each tested.

Others carry a state along the row (Mamba, linear attention, convolutions) or call attention without it, and would let
one sample see another.
"""


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tree: Tree | None = None,
    seen: Seen | None = None,
    blocks: bool = True,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' `AttentionInterface`.

    Args:
        query: [1, heads, tokens, channels]; key, value: the same with as many heads or fewer.
        tree: the row's samples; None for a batch as any other.
        seen: of a step of many answers (`mmpeft.models.slots`), what each one's token sees; query: [answers, heads, 1,
            channels].
        blocks: compute in large matrix products where that is faster (`mmpeft.models.block_attention`), or in one call
            where the device can.

    Returns:
        [1, tokens, heads, channels], and None for the weights.
    """
    if seen is not None:
        attention_mask = seen.mask(sliding_window, query.device)
    if tree is None:
        # A layer with a sliding window gets it from its mask here, as under "sdpa".
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    kernel = kernel_for(query, tree, dropout) if blocks else None
    if kernel is not None:
        return varlen_attention(kernel, query, key, value, tree, scale=scaling, window=sliding_window), None
    runs = _runs(tree)
    lengths = [run.count * run.length for run in runs]
    # One split, and so one gradient of the whole row, however many samples stand in it.
    parts = zip(runs, query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    before: dict[tuple[int, int] | None, tuple[torch.Tensor, torch.Tensor]] = {}
    pieces = []
    for run, queries, keys, values in parts:
        keys, values = _stacked(keys, run), _stacked(values, run)
        if run.count == 1 and run.parent is None:
            before[run.bounds] = keys, values
        if run.parent is not None:
            keys, values = (
                torch.cat((shared.expand(run.count, -1, -1, -1), own), dim=2)
                for shared, own in zip(before[run.parent], (keys, values), strict=True)
            )
        mask = _mask(tree, run, sliding_window, query)
        stacked = _stacked(queries, run)
        found = _attended(stacked, keys, values, mask, dropout=dropout, scaling=scaling, blocks=blocks)
        pieces.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(pieces)[None], None


def _attended(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    blocks: bool,
) -> torch.Tensor:
    if blocks and not dropout and blocks_pay(query):
        return block_attention(query, key, value, mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, mask, dropout, mask is None, scale=scaling, enable_gqa=grouped
    )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Segments one behind the other that are of one length and continue the same segment: one call for all of them.

    Attributes:
        bounds: tokens [start, end) of its first segment.
        count: how many they are; one where tokens see each other both ways (`blocks`).
    """

    bounds: tuple[int, int]
    count: int
    parent: tuple[int, int] | None
    blocks: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        return self.bounds[1] - self.bounds[0]


def _runs(tree: Tree) -> list[_Run]:
    parents = {segment.parent for segment in tree.segments}
    runs = []
    for _, alike in groupby(tree.segments, key=lambda segment: _shape(segment, parents)):
        segments = list(alike)
        first = segments[0]
        bounds = first.start, first.end
        runs.append(_Run(bounds=bounds, count=len(segments), parent=first.parent, blocks=first.blocks))
    return runs


def _shape(segment: Segment, parents: Set[tuple[int, int] | None]) -> tuple[Any, ...]:
    bounds = segment.start, segment.end
    alone = bounds if segment.blocks or bounds in parents else None
    return segment.end - segment.start, segment.parent, alone


def _stacked(row: torch.Tensor, run: _Run) -> torch.Tensor:
    """[1, heads, tokens of the run, channels] as [segments, heads, tokens, channels]; a view."""
    return row if run.count == 1 else row[0].unflatten(1, (run.count, run.length)).transpose(0, 1)


_MASKS: WeakKeyDictionary[Tree, dict[Any, torch.Tensor]] = WeakKeyDictionary()
"""Masks of the rows at hand, for their layers to share; they go with the row."""


def _mask(tree: Tree, run: _Run, window: int | None, query: torch.Tensor) -> torch.Tensor | None:
    """[own tokens, tokens seen], 0 where seen, else minus infinity; None where plain causal attention is the same.

    In numbers rather than truths: the kernels would turn these into numbers in every layer.
    """
    before = run.parent[1] - run.parent[0] if run.parent else 0
    narrow = window if window is not None and before + run.length > window else None
    if not (before or narrow or run.blocks):
        return None
    masks = _MASKS.setdefault(tree, {})
    key = run.length, before, narrow, run.blocks, query.dtype, query.device
    if key not in masks:
        # What evaluation makes under inference_mode could not be used in training.
        with torch.inference_mode(False):
            seen = _seen(run, before, narrow, query.device)
            masks[key] = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    return masks[key]


def _seen(run: _Run, before: int, window: int | None, device: torch.device) -> torch.Tensor:
    seen = torch.ones(run.length, before + run.length, dtype=torch.bool, device=device).tril(before)
    if window is not None:
        seen = seen.triu(before - window + 1)
    for start, end in run.blocks:
        rows = slice(start - run.bounds[0], end - run.bounds[0])
        seen[rows, before + rows.start : before + rows.stop] = True
    return seen


class _Masks:
    """What the layers of a forward get for a mask: those of a row none, any other what they get under SDPA."""

    def __init__(self) -> None:
        self.row = False

    def look(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See whether a forward is one of a row."""
        self.row = "tree" in kwargs

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        # transformers would build a square block mask for a row.
        return None if self.row and kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


@cache
def _uncompiled(blocks: bool) -> Any:
    # It follows the samples of a row: compiled, each row would be a program of its own.
    return torch.compiler.disable(partial(tree_attention, blocks=blocks))


@contextlib.contextmanager
def tree_attention_on(model: Any, *, blocks: bool = True) -> Iterator[None]:
    """Let the language model of `model` take rows of several samples (`tree=`); its towers stay as they are.

    Args:
        model: a transformers model, or a `PeftModel` around one.
        blocks: compute in large matrix products, or a row in one call, where that is faster.
    """
    AttentionInterface.register(NAME, _uncompiled(blocks))
    masks = _Masks()
    AttentionMaskInterface.register(NAME, masks)
    base: Any = base_of(model)
    looking = base.register_forward_pre_hook(masks.look, with_kwargs=True)
    try:
        with attending_by(base, NAME):
            yield
    finally:
        looking.remove()


@contextlib.contextmanager
def attending_by(base: Any, name: str) -> Iterator[None]:
    """Let the language model of a transformers model attend by what is registered by this name."""
    text = base.config.get_text_config()
    key = next((each for each in base.config.sub_configs if getattr(base.config, each, None) is text), "")
    before = text._attn_implementation
    base.set_attn_implementation({key: name})
    try:
        yield
    finally:
        base.set_attn_implementation({key: before})


def at_once(model: Any, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of `model` are computed in one call or in large products, not by SDPA a sample at a time."""
    text: Any = base_of(model).config.get_text_config()
    query = torch.empty(1, 1, 1, head_channels(text), dtype=dtype, device=device)
    row = Tree(segments=(Segment(start=0, end=1),), samples=1, tokens=1, padded=1)
    return blocks_pay(query) or kernel_for(query, row, 0.0) is not None


def row_obstacle(model: Any, what: str) -> str | None:
    """Why several of `what` ("samples", "prompts") cannot share a row of a model; None if they can."""
    spec, text = family_of(model), model.config.get_text_config()
    if not spec.packable:
        return f"{what} of the family {spec.name} cannot share a row"
    if text.model_type not in EXACT:
        return f"{what} cannot share a row of a language model of type {text.model_type!r}"
    if text._attn_implementation != "sdpa":
        return f"the model's attention is {text._attn_implementation!r}, and rows need 'sdpa'"
    return None


def check_attention(model: Any, inputs: Mapping[str, Any]) -> None:
    """Make sure that a packed row meets an attention that keeps its samples apart.

    Raises:
        ModelError: `tree_attention_on` is not in force.
    """
    # Also within another that hands whole rows on to it.
    if "tree" in inputs and not model.config.get_text_config()._attn_implementation.endswith(NAME):
        raise ModelError("a packed row (PackedCollator) needs mmpeft.models.tree_attention.tree_attention_on(model)")
