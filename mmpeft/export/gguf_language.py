"""A language model as llama.cpp has it: names of tensors, order of rows, and numbers that describe it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mmpeft.core.errors import ModelError
from mmpeft.export.gguf_file import Piece, Take, gguf_package


@dataclass(frozen=True, kw_only=True)
class Language:
    """An architecture of language models.

    Attributes:
        arch: llama.cpp's name of it.
        interleaved: whether llama.cpp turns neighbouring channels of a head together, where transformers turns the
            two halves of a head: rows of queries and keys then change places.
    """

    arch: str
    interleaved: bool = False


LANGUAGES: Mapping[str, Language] = {
    "llama": Language(arch="llama", interleaved=True),
    "qwen2": Language(arch="qwen2"),
    "qwen2_5_vl_text": Language(arch="qwen2vl"),
}
"""By the type of the language model's configuration."""

_ROTARY = ("default", "linear", "llama3")


def language_of(config: Any, name: str) -> Language:
    """How a language model is written.

    Args:
        config: its configuration.
        name: of the whole model, for messages.

    Raises:
        ModelError: mmpeft does not write it as GGUF, or llama.cpp would compute something else.
    """
    found = LANGUAGES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"{name}: its language model is of type {config.model_type}, which is not written as GGUF; these are "
            f"{', '.join(LANGUAGES)}"
        )
    rotary = config.rope_parameters.get("rope_type", "default")
    why = ""
    if rotary not in _ROTARY:
        why = f"its rotary positions are of type {rotary}"
    elif config.hidden_act not in ("silu", "swish"):
        why = f"its activation is {config.hidden_act}"
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        why = "its attention looks back through a window"
    if why:
        raise ModelError(f"{name}: {why}, which llama.cpp's {found.arch} does not compute")
    return found


def add_language(writer: Any, language: Language, config: Any, *, rows: int) -> None:
    """Write the keys that describe a language model.

    Args:
        writer: of the file.
        language: its architecture.
        config: its configuration.
        rows: of its embeddings.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_vocab_size(rows)
    if language.interleaved:
        writer.add_rope_dimension_count(head)
    if rotary.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary["factor"])
    if sections := rotary.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, 0, 0, 0, 0][:4])


class LanguageNames:
    """Names and rows of a language model's tensors in GGUF.

    Args:
        language: its architecture.
        config: its configuration.
        prefix: where its body is in the whole model, as parameters are named.
    """

    def __init__(self, language: Language, config: Any, prefix: str) -> None:
        package = gguf_package()
        arch = next(key for key, name in package.MODEL_ARCH_NAMES.items() if name == language.arch)
        self._map = package.get_tensor_name_map(arch, config.num_hidden_layers)
        self._language, self._config, self._prefix = language, config, prefix

    def name(self, parameter: str) -> str | None:
        """The name of a parameter in GGUF; None if it is none of the language model's."""
        if parameter.startswith(f"{self._prefix}."):
            parameter = f"model.{parameter.removeprefix(f'{self._prefix}.')}"
        elif not parameter.startswith("lm_head."):
            return None
        found: str | None = self._map.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return found

    def take(self, parameter: str) -> Take:
        """The rows of a parameter in the order of GGUF."""
        heads = {"q_proj": self._config.num_attention_heads, "k_proj": self._config.num_key_value_heads}
        count = heads.get(parameter.split(".")[-2])
        return interleaved(count) if self._language.interleaved and count else lambda tensor: tensor


def interleaved(heads: int) -> Take:
    """Rows of queries or keys with the two halves of each head in turn: first of the one, first of the other, ..."""

    def take(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return take


def rotary_factors(config: Any) -> torch.Tensor | None:
    """By what llama.cpp divides each rotary frequency, where that is not by one number for all: [head / 2]."""
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "llama3":
        return None
    scaled = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2).float() / head)
    return plain / scaled


ROTARY_FACTORS = "rope_freqs.weight"


def extra_pieces(config: Any) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Tensors of the file that no tensor of the model makes."""
    factors = rotary_factors(config)
    if factors is not None:
        yield Piece(source=ROTARY_FACTORS, name=ROTARY_FACTORS, shape=tuple(factors.shape)), factors
