"""Tiny random models of any type in `AutoModelForImageTextToText`, from its default configuration, without network.

Every field of the configuration that sizes the model is set by its name to one small value (`SIZES`): each part has
the same width, so what one part hands to the next always fits. Lists with an entry for each layer keep one layer of
each kind. Special tokens get numbers at the end of the small vocabulary. `SPECIAL` holds what a type needs beyond.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

MODEL_TYPES: tuple[str, ...] = tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

HIDDEN, HEADS, HEAD_DIM, VOCAB, IMAGE, PATCH = 64, 4, 16, 256, 32, 8

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"mrope_section": [3, 3, 2], "partial_rotary_factor": 1.0}
"""Rotary sections of height, width and time that fill half a head."""

SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size(_per_layer_input)?", VOCAB),
    (r"(.*_)?num_(.*_)?key_value_heads", 2),
    (r"(.*_)?(num_heads|attention_heads|n_heads|resampler_heads|linear_num_\w*heads|num_\w*heads)", HEADS),
    (r"(.*_)?head_dim|d_kv|resampler_dim_head", HEAD_DIM),
    (r"(.*_)?(lora_rank|laurel_rank|gate_rank|lowrank)", 16),
    (r"(.*_)?(hidden_layers|num_layers|encoder_layers|decoder_layers|depth|layers|n_layers|add_layers)", 2),
    (r"(.*_)?(num_experts|n_routed_experts|num_local_experts)", 4),
    (r"num_experts_per_tok|moe_k|moe_topk|top_k_experts", 2),
    (r"n_shared_experts|moe_num_shared_experts|n_groups?|topk_group", 1),
    (r"(.*_)?(image_size|img_size|resolution)", IMAGE),
    (r"(.*_)?patch_size", PATCH),
    (r"num_position_embeddings|num_patches|max_num_patches", (IMAGE // PATCH) ** 2),
    (r"num_filters|mm_tokens_per_image|latent_query_num|num_query_tokens|.*_latents", 4),
    (r"patch_embed_hidden_size", 3 * PATCH * PATCH),
    (r"(.*_)?((?<!downsample_)channels|hidden_sizes|codebook_size|num_embeddings)", 32),
    (
        r"(.*_)?(hidden_size|downsample_channels|hidden_dim|d_model|embed_dim|word_embed_proj_dim|output_dim|input_dim|projection_dim|in_dim|out_dim)",
        HIDDEN,
    ),
    (r"(.*_)?(intermediate_size|ffn_dim|mlp_dim|d_ff|expert_dim)(_.*)?", 2 * HIDDEN),
)
"""Names of fields, as patterns of the whole name, and the value that each gets; the first that matches counts."""

_CHAMELEON = {
    f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(number))}Z": 100 + number for number in range(32)
}
_EMU3 = {f"<|visual token {number:06d}|>": 100 + number for number in range(32)}

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "apertus1p5": {"audio_config.codebook_dim": HIDDEN, "image_token_offset": 100, "audio_token_offset": 132},
    "aria": {"projector_patch_to_query_dict": {(IMAGE // PATCH) ** 2: 4}},
    "chameleon": {"vocabulary_map": {"<image>": 250, **_CHAMELEON}},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse"], "text_config.num_experts_per_tok": 2},
    "dots3_note": {
        "audio_config.adapter_input_size": HIDDEN,
        "text_config.swa_num_attention_heads": HEADS,
        "text_config.swa_num_key_value_heads": HEADS,
        "text_config.swa_q_lora_rank": 16,
        "text_config.swa_kv_lora_rank": 16,
        "text_config.swa_head_dim": 2 * HEAD_DIM,
        "text_config.swa_qk_nope_head_dim": HEAD_DIM,
        "text_config.swa_v_head_dim": HEAD_DIM,
    },
    "emu3": {"vocabulary_map": {"<image>": 250, "<|extra_200|>": 251, **_EMU3}, "vq_config.hidden_size": 128},
    "fast_vlm": {
        "vision_config.architecture": "test_resnet",
        "vision_config.hidden_size": 96,
        "vision_config.model_args": None,
    },
    "florence2": {"vision_config.patch_size": [7, 3, 3, 3]},
    "gemma3n": {
        "text_config.num_kv_shared_layers": 0,
        "vision_config.architecture": "test_efficientnet",
        "vision_config.hidden_size": 256,
        "vision_soft_tokens_per_image": 1,
    },
    "gemma4_unified": {"vision_config.pooling_kernel_size": 1, "vision_config.output_proj_dims": HIDDEN},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "downsample_rate": "1/2", "spatial_target_layers": [0] * 4},
    "hunyuan_vl": {"text_config.head_dim": HEAD_DIM},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": HIDDEN,
    },
    "muse_glimmer": {"out_hidden_size": 4 * HIDDEN},
    "muse_spark": {"out_hidden_size": 4 * HIDDEN},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "llama4": {"vision_config.intermediate_size": 4 * HIDDEN},
    "mllama": {"vision_config.vision_output_dim": 2 * HIDDEN},
    "paddleocr_vl": {"text_config.rope_parameters": {**_ROTARY, **MROPE}},
    "perception_lm": {
        "vision_config.architecture": "test_vit",
        "vision_config.model_args": {"embed_dim": HIDDEN, "img_size": [IMAGE, IMAGE], "global_pool": ""},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 240, "audio_start_token_id": 241},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 240, "audio_start_token_id": 241},
    "step3p7": {"text_config.sliding_window": 8},
    "udop": {"decoder_start_token_id": 0},
    "vision-encoder-decoder": {"decoder_start_token_id": 0, "pad_token_id": 0},
    "vipllava": {"vision_feature_layers": [-1, -2, -1, -2, 1]},
    "nemotron_h_omni": {"audio_config.projection_hidden_size": HIDDEN, "audio_config.projection_bias": False},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD_DIM,
        "text_config.indexer_budget": 8,
        "text_config.indexer_compress_ratio": 2,
    },
}
"""By model type: fields, dotted into its parts, that the names alone don't get right."""


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model of this type with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny_config(model_type)).eval()
    # Weights that begin at zero (gates, Gemma 3's projection) would keep the picture out.
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not name.endswith("bias") and not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return model


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The smallest configuration of this type that still has each of its parts and kinds of layer."""
    tokens: dict[str, int] = {}
    return _shrink(CONFIG_MAPPING[model_type](), SPECIAL.get(model_type, {}), tokens)


def _shrink(config: PreTrainedConfig, special: Mapping[str, Any], tokens: dict[str, int]) -> PreTrainedConfig:
    kept, count = _layers(config), getattr(config, "num_hidden_layers", 0)
    values: dict[str, Any] = {}
    for name, default in _fields(config).items():
        value = vars(config).get(config.attribute_map.get(name, name))
        if name in config.sub_configs or isinstance(value, PreTrainedConfig):
            if value is None and name in getattr(config, "sub_configs_defaults", {}):
                value = config.sub_configs_defaults[name]
                value = value() if isinstance(value, type) else value.default_config
            inner = {key.partition(".")[2]: v for key, v in special.items() if key.startswith(f"{name}.")}
            values[name] = value and _shrink(value, inner, tokens)
        else:
            small = _small(name, value, kept, count, tokens)
            if small != default:
                values[name] = small
    heads = {
        vars(config).get(config.attribute_map.get(name, name))
        for name in ("num_attention_heads", "num_key_value_heads")
    }
    if len(heads) == 1 and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS
    values |= {key: value for key, value in special.items() if "." not in key}
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        rotary = vars(config).get("rope_parameters") or dict.fromkeys(set(config.layer_types), _ROTARY)
        values["rope_parameters"] = _rotary(rotary, sections=True)
    return type(config)(**values)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that a configuration's class declares, without those of every configuration but its tokens."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.name not in common or field.name.endswith("token_id")
    }


def _layers(config: PreTrainedConfig) -> list[int]:
    """Numbers of the layers that are kept: the first of each kind, and at least two."""
    count = getattr(config, "num_hidden_layers", 0) or 0
    if not isinstance(count, int):
        return []
    kinds = [
        value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == count and re.fullmatch(r".*(layer_types|block_type)", name)
    ]
    if not kinds:
        return list(range(min(count, 2)))
    first: dict[Any, int] = {}
    for number, kind in enumerate(zip(*kinds, strict=True)):
        first.setdefault(kind, number)
    kept = sorted(first.values())
    return kept if len(kept) > 1 else [0, 1][:count]


def _small(name: str, value: Any, kept: list[int], count: int, tokens: dict[str, int]) -> Any:
    """The value that a field gets."""
    if name in ("initializer_range", "init_std"):
        return 0.1
    if value is None and re.fullmatch(r"(image|video)_token_(id|index)", name):
        return _token(name, 0, tokens)
    if isinstance(value, bool | float | str) or value is None:
        return value
    if isinstance(value, Mapping):
        return _rotary(value) if name == "rope_parameters" else value
    if re.fullmatch(r".*(token_(id|index|ids)|_patch_id)", name):
        return _token(name, value, tokens)
    if isinstance(value, list | tuple):
        return type(value)(_small_list(name, value, kept, count))
    if re.fullmatch(r"num_hidden_layers|n_layers|depth", name) and kept:
        return len(kept)
    size = _size(name)
    return value if size is None else min(size, value)


def _small_list(name: str, values: Sequence[Any], kept: list[int], count: int) -> Sequence[Any]:
    """An entry for each layer that is kept; numbers of layers within what is kept; sizes by name."""
    if name == "image_grid_pinpoints":
        return [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]]
    size = _size(name)
    if count and len(values) == count:
        if list(values) == list(range(count)):
            return range(len(kept))
        values = [values[number] for number in kept]
    elif re.fullmatch(r".*(index|indexes|indices|idxs|layers)", name) and all(isinstance(v, int) for v in values):
        return [0]
    return values if size is None else [size] * len(values)


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _token(name: str, value: Any, tokens: dict[str, int]) -> Any:
    """A number of its own for each name of a special token, the same in every part."""
    if isinstance(value, list | tuple):
        return type(value)(_token(f"{name}.{place}", entry, tokens) for place, entry in enumerate(value))
    name = name.replace("_index", "_id")
    return tokens.setdefault(name, VOCAB - 1 - len(tokens)) if value >= 0 else value


def _rotary(parameters: Mapping[str, Any], sections: bool = False) -> dict[str, Any]:
    """Rotary parameters with sections that fit the small head, by kind of layer or one for all."""
    if parameters and all(isinstance(value, Mapping) for value in parameters.values()):
        return {key: _rotary(value, sections) for key, value in parameters.items()}
    return {**parameters, **(MROPE if sections or "mrope_section" in parameters else {})}
