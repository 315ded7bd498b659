"""Models of the benchmarks: shapes of published ones with random weights, real processors, made without a network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mmpeft  # noqa: F401, before transformers: it makes a CUDA build of torchvision importable beside CPU torch

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # isort: skip
from transformers import (  # isort: skip
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

LLAVA_TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}{%- endif -%}"
    "{{ '\nASSISTANT:' }}"
    "{%- else -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}{{ message['content'][0]['text'] }}"
    "{%- endif -%}{{ eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
"""ms-swift's for LLaVA 1.5, so that all see the same tokens."""

QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}{{ '<|im_end|>' }}{%- if not loop.last or add_generation_prompt -%}{{ '\n' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""The published one, but for the newline behind the last turn, on which not all programs put a label."""

QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The language model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The vision tower: of CLIP's kind for LLaVA, of Qwen2.5-VL's for Qwen.

    Attributes:
        side: pixels of a picture each way.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    patch: int
    side: int


SMOLLM2_135M = Decoder(hidden=576, intermediate=1536, layers=30, heads=9, kv_heads=3, vocabulary=49_152)
QWEN2_5_0_5B = Decoder(hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, vocabulary=151_936)
QWEN2_5_3B = Decoder(hidden=2048, intermediate=11_008, layers=36, heads=16, kv_heads=2, vocabulary=151_936)
QWEN2_5_7B = Decoder(hidden=3584, intermediate=18_944, layers=28, heads=28, kv_heads=4, vocabulary=152_064, tied=False)
_CLIP_L = Tower(hidden=1024, intermediate=4096, layers=24, heads=16, patch=14, side=336)
_QWEN_TOWER = Tower(hidden=1280, intermediate=3420, layers=32, heads=16, patch=14, side=448)
_TINY = Decoder(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=512)

SIZES: dict[str, dict[str, tuple[Decoder, Tower]]] = {
    "tiny": {
        "llava": (_TINY, Tower(hidden=32, intermediate=64, layers=2, heads=2, patch=8, side=32)),
        "qwen": (_TINY, Tower(hidden=32, intermediate=64, layers=2, heads=2, patch=14, side=56)),
    },
    "135m": {
        # SmolLM2-135M with CLIP ViT-B/16: 196 picture tokens. Beside it a tower of Qwen2.5-VL's kind: 100.
        "llava": (SMOLLM2_135M, Tower(hidden=768, intermediate=3072, layers=12, heads=12, patch=16, side=224)),
        "qwen": (SMOLLM2_135M, Tower(hidden=768, intermediate=2048, layers=12, heads=12, patch=14, side=280)),
    },
    "0.5b": {"llava": (QWEN2_5_0_5B, _CLIP_L), "qwen": (QWEN2_5_0_5B, _QWEN_TOWER)},
    "3b": {"llava": (QWEN2_5_3B, _CLIP_L), "qwen": (QWEN2_5_3B, _QWEN_TOWER)},
    "7b": {"llava": (QWEN2_5_7B, _CLIP_L), "qwen": (QWEN2_5_7B, _QWEN_TOWER)},
}


def make_model(kind: str, size: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a model and its processor to `folder`, as an ordinary model directory."""
    decoder, tower = SIZES[size][kind]
    make = _llava if kind == "llava" else _qwen
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        model, processor = make(decoder, tower)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _raw_tokenizer() -> Tokenizer:
    """Bytes as tokens, so that a text has as many as it has bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def _llava(decoder: Decoder, tower: Tower) -> tuple[Any, Any]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_raw_tokenizer(), chat_template=LLAVA_TEMPLATE)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": tower.side, "width": tower.side}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=tower.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    vision = CLIPVisionConfig(
        hidden_size=tower.hidden,
        intermediate_size=tower.intermediate,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.side,
        patch_size=tower.patch,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=LlamaConfig(
            **_text(decoder),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=(tower.side // tower.patch) ** 2,
        tie_word_embeddings=decoder.tied,
    )
    return LlavaForConditionalGeneration(config), processor


def _qwen(decoder: Decoder, tower: Tower) -> tuple[Any, Any]:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_raw_tokenizer(),
        chat_template=QWEN_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens=QWEN_TOKENS,
    )
    geometry = {"patch_size": tower.patch, "merge_size": 2, "size": {"shortest_edge": 784, "longest_edge": 12_845_056}}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**geometry), tokenizer, Qwen2VLVideoProcessor(**geometry), chat_template=QWEN_TEMPLATE
    )
    half = decoder.hidden // decoder.heads // 2
    vision = {
        "depth": tower.layers,
        "hidden_size": tower.hidden,
        "intermediate_size": tower.intermediate,
        "num_heads": tower.heads,
        "out_hidden_size": decoder.hidden,
        "patch_size": tower.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 8 * tower.patch,
        # As in Qwen2.5-VL, one layer in four sees the whole picture, the others windows of it.
        "fullatt_block_indexes": list(range(3, tower.layers, 4)) or [tower.layers - 1],
    }
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]
    text = {
        **_text(decoder),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": sections},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in QWEN_TOKENS.items()}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=decoder.tied, **ids)
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _text(decoder: Decoder) -> dict[str, Any]:
    return {
        "vocab_size": decoder.vocabulary,
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "tie_word_embeddings": decoder.tied,
    }
