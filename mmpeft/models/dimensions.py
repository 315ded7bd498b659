"""Sizes that a model's configuration says."""

from typing import Any

from mmpeft.models.base import base_of


def head_channels(text: Any) -> int:
    """Channels of an attention head of a language model's configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def key_heads(text: Any) -> int:
    """Heads of keys and values of a language model's configuration; several queries' heads may share one."""
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def cache_bytes(model: Any, tokens: int, size: int) -> int:
    """What keys and values of so many tokens take in all layers, at `size` bytes a number."""
    text = base_of(model).config.get_text_config()
    return 2 * int(text.num_hidden_layers) * key_heads(text) * int(head_channels(text)) * tokens * size
