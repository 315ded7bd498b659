"""Batches that are padded on the right, without a mask: no token sees what stands behind it.

    q w e r t y        mask, [rows, 1, tokens, tokens], of which the half above the diagonal is never seen,
    a s - - - -        and of the rest only what padding's own rows see

So the kernels may take plain causal attention, which needs no mask and skips that half. What comes out in padding is
not the same; no label stands there.
"""

from typing import Any

from mmpeft.families.registry import family_of
from mmpeft.models.base import base_of
from mmpeft.models.head_loss import unchunkable
from mmpeft.models.tree_attention import EXACT

CAUSAL = EXACT - {"qwen2_5_omni_text"} | {"qwen3_5_text"}
"""Types of language models that look back only, layer by layer, and count positions from the left; each tested.

Qwen2.5-Omni counts the positions of a whole batch by its mask."""


def needs_mask(model: Any) -> str | None:
    """Why padded batches need their mask; None if they do not."""
    base: Any = base_of(model)
    text = base.config.get_text_config()
    if unchunkable(model) is not None or text.model_type not in CAUSAL:
        return f"a language model of type {text.model_type!r} was not tested without"
    if family_of(base).token_types == "suffix":
        return "prompts are seen both ways, and padding would be a part of them"
    if text._attn_implementation != "sdpa":
        return f"the model's attention is {text._attn_implementation!r}; it was tested with 'sdpa'"
    return None


def without_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook (`with_kwargs`): forwards with labels get no mask."""
    if kwargs.get("labels") is None or "attention_mask" not in kwargs:
        return None
    return args, {key: value for key, value in kwargs.items() if key != "attention_mask"}
