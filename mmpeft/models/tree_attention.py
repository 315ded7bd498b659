"""Attention over a row of several samples, some of which share their beginning: exact, and without a square mask.

Every segment sees itself up to each token, and all of the segment that it stands on. It runs segment by segment through
`scaled_dot_product_attention`, so that what is computed is what the samples need and nothing is masked out.

`tree_attention_on` sets it up through transformers' own registries; a forward without `tree` runs as under "sdpa".
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmpeft.core.errors import ModelError
from mmpeft.core.tree import Segment, Tree

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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers' `AttentionInterface`.

    Args:
        query: [1, heads, tokens, channels]; key, value: the same with as many heads or fewer.
        tree: the row's samples; None for a batch as any other.

    Returns:
        [1, tokens, heads, channels], and None for the weights.
    """
    if tree is None:
        # A layer with a sliding window gets it from its mask here, as under "sdpa".
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    grouped = query.shape[1] != key.shape[1]
    pieces = []
    for segment in tree.segments:
        own = slice(segment.start, segment.end)
        if segment.parent is None:
            keys, values = key[:, :, own], value[:, :, own]
        else:
            before = slice(*segment.parent)
            keys = torch.cat((key[:, :, before], key[:, :, own]), dim=2)
            values = torch.cat((value[:, :, before], value[:, :, own]), dim=2)
        mask = _mask(segment, sliding_window, query.device)
        pieces.append(
            scaled_dot_product_attention(
                query[:, :, own], keys, values, mask, dropout, mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _mask(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[own tokens, tokens seen], True where seen; None where plain causal attention is the same."""
    own = segment.end - segment.start
    before = segment.parent[1] - segment.parent[0] if segment.parent else 0
    narrow = window is not None and before + own > window
    if not (before or narrow or segment.blocks):
        return None
    seen = torch.ones(own, before + own, dtype=torch.bool, device=device).tril(before)
    if narrow and window is not None:
        seen = seen.triu(before - window + 1)
    for start, end in segment.blocks:
        rows = slice(start - segment.start, end - segment.start)
        seen[rows, before + rows.start : before + rows.stop] = True
    return seen


def _tree_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    # Without a padding mask a row is a tree, or causal alone; transformers would build a square block mask for it.
    return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


@contextlib.contextmanager
def tree_attention_on(model: Any) -> Iterator[None]:
    """Let the language model of `model` take rows of several samples (`tree=`); its towers stay as they are.

    Args:
        model: a transformers model, or a `PeftModel` around one.
    """
    AttentionInterface.register(NAME, tree_attention)
    AttentionMaskInterface.register(NAME, _tree_mask)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    text = base.config.get_text_config()
    key = next((name for name in base.config.sub_configs if getattr(base.config, name, None) is text), "")
    before = text._attn_implementation
    base.set_attn_implementation({key: NAME})
    try:
        yield
    finally:
        base.set_attn_implementation({key: before})


def check_attention(model: Any, inputs: Mapping[str, Any]) -> None:
    """Make sure that a packed row meets an attention that keeps its samples apart.

    Raises:
        ModelError: `tree_attention_on` is not in force.
    """
    if "tree" in inputs and model.config.get_text_config()._attn_implementation != NAME:
        raise ModelError("a packed row (PackedCollator) needs mmpeft.models.tree_attention.tree_attention_on(model)")
