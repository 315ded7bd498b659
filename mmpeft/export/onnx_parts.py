"""What of a model becomes a graph of its own, and by which inputs it is traced.

    pixels -> vision.onnx ----.
    tokens -> embedding.onnx -+-> decoder.onnx -> head.onnx -> logits
                  past keys and values <-'

The head is apart, so that a prompt's other positions never reach it, whoever asks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from mmpeft.core.errors import ModelError
from mmpeft.export.w8a8 import quantize_rows
from mmpeft.models.dimensions import head_channels, key_heads
from mmpeft.models.tree_attention import attending_by

EMBEDDING, DECODER, HEAD, VISION = "embedding", "decoder", "head", "vision"

_FULL = "full_attention"

_ATTENTION = "mmpeft_onnx"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a model.

    Attributes:
        name: of its graph.
        module: gives a mapping of outputs by name.
        inputs: by name what it is traced with.
        varying: by input those of its dimensions that are not fixed.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Any]
    varying: Mapping[str, Any]


class _Embedding(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.table(input_ids)}


class _Int8Embedding(nn.Module):
    """Rows in int8, with a scale each."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        whole, scale = quantize_rows(weight)
        self.register_buffer("weight", whole)
        self.register_buffer("scale", scale)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.weight[input_ids].to(self.scale.dtype) * self.scale[input_ids]}


class _TiedEmbedding(nn.Module):
    """Rows of a head that ONNX Runtime has in blocks of int8; their numbers come from its file.

    weight    [words, blocks, block]    128 is 0
    scale     [words, blocks]
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, words: int, blocks: int, block: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(words, blocks, block, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(words, blocks))
        self.channels = channels

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        whole = (self.weight[input_ids].to(self.scale.dtype) - 128) * self.scale[input_ids][..., None]
        return {"inputs_embeds": whole.flatten(-2)[..., : self.channels]}


class _Decoder(nn.Module):
    """Attention is ONNX's own, which reads keys and values as they are, however many heads share them."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder: Any = decoder

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: Any
    ) -> dict[str, Any]:
        cache = DynamicCache()
        for number, (keys, values) in enumerate(past):
            cache.update(keys, values, number)
        AttentionInterface.register(_ATTENTION, _attention)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        with attending_by(self.decoder, _ATTENTION):
            output = self.decoder(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                use_cache=True,
            )
        layers: Any = cache.layers
        present = [[layer.keys, layer.values] for layer in layers]
        return {"last_hidden_state": output.last_hidden_state, "present": present}


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Of transformers' `AttentionInterface`, as one operator."""
    if attention_mask is None:
        raise ModelError("a decoder is traced with its mask")
    found = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scaling)[0]
    return found.transpose(1, 2).contiguous(), None


class _Head(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(hidden_states)}


def language_parts(model: Any, *, int8: bool, tied: bool = False) -> list[Part]:
    """Embedding, decoder with past, and head of a model in float32.

    Args:
        int8: store the embedding in int8, with a scale a row.
        tied: leave the embedding out, of which the head has all.

    Raises:
        ModelError: its decoder keeps something else than keys and values of all tokens.
    """
    decoder = model.get_decoder()
    config = decoder.config
    check_decoder(config)
    layers, heads, width, channels = _cache_shape(config)
    table = model.get_input_embeddings()
    rows, length, past = 2, 3, 5
    positions = torch.arange(past, past + length).expand(rows, -1).contiguous()
    axes = position_axes(config)
    hidden = torch.zeros(rows, length, channels)
    return [
        *([] if tied else [_embedding(_own_embedding(table, int8=int8))]),
        Part(
            name=DECODER,
            module=_Decoder(decoder),
            inputs={
                "inputs_embeds": hidden,
                "attention_mask": torch.ones(rows, past + length, dtype=torch.long),
                "position_ids": positions.expand(axes, -1, -1).contiguous() if axes else positions,
                "past": [[torch.zeros(rows, heads, past, width) for _ in range(2)] for _ in range(layers)],
            },
            varying={
                "inputs_embeds": (0, 1),
                "attention_mask": (0, 1),
                "position_ids": (1, 2) if axes else (0, 1),
                "past": [[(0, 2), (0, 2)] for _ in range(layers)],
            },
        ),
        Part(
            name=HEAD,
            module=_Head(model.get_output_embeddings()),
            inputs={"hidden_states": hidden},
            varying={"hidden_states": (0, 1)},
        ),
    ]


def tied_embedding(words: int, blocks: int, block: int, channels: int) -> Part:
    """The embedding of a model whose head has the same weights, in int8, for one copy of them on disk."""
    return _embedding(_TiedEmbedding(words, blocks, block, channels))


def _own_embedding(table: nn.Module, *, int8: bool) -> nn.Module:
    # Tables of other classes do more than look up.
    return _Int8Embedding(table.weight.detach()) if int8 and type(table) is nn.Embedding else _Embedding(table)


def _embedding(module: nn.Module) -> Part:
    return Part(
        name=EMBEDDING,
        module=module,
        inputs={"input_ids": torch.zeros(2, 3, dtype=torch.long)},
        varying={"input_ids": (0, 1)},
    )


def is_tied(model: Any) -> bool:
    """Whether the head is the embedding's table, and nothing more."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return type(table) is nn.Embedding and type(head) is nn.Linear and head.weight is table.weight and head.bias is None


def check_decoder(config: Any) -> None:
    """Refuse a decoder that keeps something else than keys and values of all tokens.

    Raises:
        ModelError: says which layers.
    """
    other = sorted(set(getattr(config, "layer_types", None) or [_FULL]) - {_FULL})
    if other:
        raise ModelError(
            f"{config.model_type}: ONNX export knows decoders with full attention alone, and this one has layers of "
            f"{', '.join(other)}; use `mmpeft export int8`"
        )


def _cache_shape(config: Any) -> tuple[int, int, int, int]:
    """Layers, heads of keys, channels of a head, channels."""
    return config.num_hidden_layers, key_heads(config), head_channels(config), config.hidden_size


def position_axes(config: Any) -> int:
    """Coordinates of a token's position where it has several (time, height, width), else 0."""
    rope = getattr(config, "rope_parameters", None) or {}
    return 3 if "mrope_section" in rope else 0
