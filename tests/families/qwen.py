"""Tiny real models of the Qwen line with their real processors: random weights, in memory, no network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.tiny import tiny_tokenizer

PATCH_SIZE, MERGE_SIZE = 4, 2
TOKEN_SIDE = PATCH_SIZE * MERGE_SIZE
"""Pixels of a picture, each way, behind one of its tokens."""

AUDIO_SECONDS = 1
SAMPLING_RATE = 16_000

VISION_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
AUDIO_TOKENS = {"audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>"}
OMNI_TOKENS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    **AUDIO_TOKENS,
}

_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ 'IMAGE' }}"
    "{%- elif item['type'] == 'video' -%}{{ 'VIDEO' }}"
    "{%- elif item['type'] == 'audio' -%}{{ 'AUDIO' }}"
    "{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

VISION_TEMPLATE = _TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>").replace(
    "VIDEO", "<|vision_start|><|video_pad|><|vision_end|>"
)
PLAIN_TEMPLATE = VISION_TEMPLATE.replace(
    "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{%- endif -%}",
    "",
)
"""Qwen3-VL and Qwen3.5 say nothing of their own before the first message."""

OMNI_TEMPLATE = (
    _TEMPLATE.replace("'IMAGE'", "'<|vision_bos|><|IMAGE|><|vision_eos|>'")
    .replace("'VIDEO'", "'<|vision_bos|><|VIDEO|><|vision_eos|>'")
    .replace("'AUDIO'", "'<|audio_bos|><|AUDIO|><|audio_eos|>'")
)
AUDIO_TEMPLATE = _TEMPLATE.replace("'AUDIO'", "'Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n'")

_SIZE = {"shortest_edge": TOKEN_SIDE**2, "longest_edge": 8 * TOKEN_SIDE**2}


def qwen_tokenizer(tokens: dict[str, str], chat_template: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with the family's special tokens, each also an attribute (`tokenizer.image_token`)."""
    plain = tiny_tokenizer(image_token=False, chat_template=chat_template)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        chat_template=chat_template,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens=tokens,
    )


def qwen_image_processor() -> Qwen2VLImageProcessor:
    return Qwen2VLImageProcessor(patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, size=dict(_SIZE))


def qwen2_video_processor() -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor(
        patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, size=dict(_SIZE), cap_pixels_per_frame=False
    )


def qwen3_video_processor() -> Qwen3VLVideoProcessor:
    size = {"shortest_edge": 2 * TOKEN_SIDE**2, "longest_edge": 32 * TOKEN_SIDE**2}
    return Qwen3VLVideoProcessor(patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, size=size, cap_pixels_per_frame=False)


def whisper_features() -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=16, sampling_rate=SAMPLING_RATE, chunk_length=2)


def _vision(**fields: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "num_heads": 2,
        "in_channels": 3,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "temporal_patch_size": 2,
        **fields,
    }


def _text(tokenizer: PreTrainedTokenizerFast, **fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # Sections of half a head (8 / 2), for time, height and width.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]},
        **fields,
    }


def _token_ids(tokenizer: PreTrainedTokenizerFast, tokens: dict[str, str]) -> dict[str, int]:
    return {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _built(model_class: Callable[[Any], PreTrainedModel], config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return model_class(config).eval()


def tiny_qwen2_vl(seed: int = 0) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    tokenizer = qwen_tokenizer(VISION_TOKENS, VISION_TEMPLATE)
    processor = Qwen2VLProcessor(
        qwen_image_processor(), tokenizer, qwen2_video_processor(), chat_template=VISION_TEMPLATE
    )
    config = Qwen2VLConfig(
        vision_config=_vision(embed_dim=16, hidden_size=32, mlp_ratio=2),
        text_config=_text(tokenizer),
        tie_word_embeddings=True,
        **_token_ids(tokenizer, VISION_TOKENS),
    )
    return _built(Qwen2VLForConditionalGeneration, config, seed), processor


def tiny_qwen2_5_vl(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    tokenizer = qwen_tokenizer(VISION_TOKENS, VISION_TEMPLATE)
    processor = Qwen2_5_VLProcessor(
        qwen_image_processor(), tokenizer, qwen2_video_processor(), chat_template=VISION_TEMPLATE
    )
    config = Qwen2_5_VLConfig(
        vision_config=_windowed_vision(),
        text_config=_text(tokenizer),
        tie_word_embeddings=True,
        **_token_ids(tokenizer, VISION_TOKENS),
    )
    return _built(Qwen2_5_VLForConditionalGeneration, config, seed), processor


def _windowed_vision() -> dict[str, Any]:
    """Attention in windows of two tokens each way in the first layer, over the whole picture in the second."""
    return _vision(
        hidden_size=16,
        out_hidden_size=32,
        intermediate_size=32,
        window_size=2 * TOKEN_SIDE,
        fullatt_block_indexes=[1],
    )


def tiny_qwen3_vl(seed: int = 0) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    tokenizer = qwen_tokenizer(VISION_TOKENS, PLAIN_TEMPLATE)
    processor = Qwen3VLProcessor(
        qwen_image_processor(), tokenizer, qwen3_video_processor(), chat_template=PLAIN_TEMPLATE
    )
    config = Qwen3VLConfig(
        vision_config=_vision(
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=32,
            num_position_embeddings=16,
            # Three, as every published size has; each is added behind a layer, so the language model needs a fourth.
            depth=3,
            deepstack_visual_indexes=[0, 1, 2],
        ),
        text_config=_text(tokenizer, head_dim=8, num_hidden_layers=4),
        tie_word_embeddings=True,
        **_token_ids(tokenizer, VISION_TOKENS),
    )
    return _built(Qwen3VLForConditionalGeneration, config, seed), processor


def tiny_qwen3_5(seed: int = 0) -> tuple[Qwen3_5ForConditionalGeneration, Qwen3VLProcessor]:
    """Linear attention in the first layer, full attention in the second."""
    tokenizer = qwen_tokenizer(VISION_TOKENS, PLAIN_TEMPLATE)
    processor = Qwen3VLProcessor(
        qwen_image_processor(), tokenizer, qwen3_video_processor(), chat_template=PLAIN_TEMPLATE
    )
    rope = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    }
    config = Qwen3_5Config(
        vision_config=_vision(hidden_size=16, out_hidden_size=32, intermediate_size=32, num_position_embeddings=16),
        text_config=_text(
            tokenizer,
            head_dim=16,
            rope_parameters=rope,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
        tie_word_embeddings=True,
        **_token_ids(tokenizer, VISION_TOKENS),
    )
    return _built(Qwen3_5ForConditionalGeneration, config, seed), processor


def omni_processor() -> Qwen2_5OmniProcessor:
    return Qwen2_5OmniProcessor(
        image_processor=qwen_image_processor(),
        video_processor=qwen2_video_processor(),
        feature_extractor=whisper_features(),
        tokenizer=qwen_tokenizer(OMNI_TOKENS, OMNI_TEMPLATE),
        chat_template=OMNI_TEMPLATE,
    )


def thinker_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5OmniThinkerConfig:
    ids = _token_ids(tokenizer, OMNI_TOKENS)
    return Qwen2_5OmniThinkerConfig(
        audio_config={**_whisper(), "output_dim": 32, "n_window": 25},
        vision_config=_windowed_vision(),
        text_config=_text(tokenizer),
        image_token_index=ids["image_token_id"],
        video_token_index=ids["video_token_id"],
        audio_token_index=ids["audio_token_id"],
        audio_start_token_id=ids["audio_bos_token_id"],
        audio_end_token_id=ids["audio_eos_token_id"],
        vision_start_token_id=ids["vision_bos_token_id"],
        vision_end_token_id=ids["vision_eos_token_id"],
        user_token_id=tokenizer.convert_tokens_to_ids("u"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def tiny_qwen2_5_omni(seed: int = 0) -> tuple[Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniProcessor]:
    """The thinker alone; `tiny_whole_omni` has talker and vocoder too."""
    processor = omni_processor()
    config = thinker_config(processor.tokenizer)
    return _built(Qwen2_5OmniThinkerForConditionalGeneration, config, seed), processor


CODES = 64
"""Speech codes of the tiny talker; the last few are its control codes."""


def tiny_whole_omni(folder: Path, seed: int = 0) -> Path:
    """A whole omni checkpoint on disk, with its processor and a speaker, as a published one lies there."""
    processor = omni_processor()
    tokenizer = processor.tokenizer
    thinker = thinker_config(tokenizer).to_dict()
    copied = ("image_token_index", "video_token_index", "audio_token_index", "vision_start_token_id")
    copied += ("vision_end_token_id", "audio_start_token_id", "audio_end_token_id")
    unused = ("bos_token_id", "eos_token_id", "pad_token_id")
    talker = {
        **{key: value for key, value in _text(tokenizer).items() if key not in unused},
        **{key: thinker[key] for key in copied},
        "vocab_size": CODES,
        "embedding_size": 32,
        "head_dim": 8,
        "tts_text_start_token_id": 1,
        "tts_text_end_token_id": 2,
        "tts_text_pad_token_id": 3,
        "tts_codec_start_token_id": CODES - 4,
        "tts_codec_end_token_id": CODES - 3,
        "tts_codec_pad_token_id": CODES - 2,
        "tts_codec_mask_token_id": CODES - 1,
    }
    config = Qwen2_5OmniConfig(
        thinker_config=thinker,
        talker_config=talker,
        token2wav_config={"dit_config": _DIT, "bigvgan_config": _BIGVGAN},
    )
    model = _built(Qwen2_5OmniForConditionalGeneration, config, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    speaker = {"bos_token": 5, "cond": torch.randn(1, 8), "ref_mel": torch.randn(1, 20, 8)}
    torch.save({"Chelsie": speaker}, folder / "spk_dict.pt")
    return folder


_DIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 8,
    "emb_dim": 16,
    "num_embeds": CODES,
    "mel_dim": 8,
    "enc_emb_dim": 8,
    "enc_dim": 8,
    "enc_channels": [16, 16, 16, 16, 48],
    "enc_attention_channels": 8,
    "enc_se_channels": 8,
    "look_ahead_layers": [1],
    "look_backward_layers": [0],
    "block_size": 8,
    "dropout": 0.0,
}
_BIGVGAN: dict[str, Any] = {
    "mel_dim": 8,
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3, 5]],
    "upsample_rates": [5, 3],
    "upsample_kernel_sizes": [11, 7],
}


def _whisper() -> dict[str, Any]:
    return {
        "num_mel_bins": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "d_model": 16,
        "max_source_positions": 100,
    }


def tiny_qwen2_audio(seed: int = 0) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    tokenizer = qwen_tokenizer(AUDIO_TOKENS, AUDIO_TEMPLATE)
    processor = Qwen2AudioProcessor(whisper_features(), tokenizer, chat_template=AUDIO_TEMPLATE)
    text = {key: value for key, value in _text(tokenizer).items() if key != "rope_parameters"}
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **_whisper()},
        text_config={"model_type": "qwen2", **text},
        audio_token_index=tokenizer.convert_tokens_to_ids(AUDIO_TOKENS["audio_token"]),
    )
    return _built(Qwen2AudioForConditionalGeneration, config, seed), processor


QWEN: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "qwen3_5": tiny_qwen3_5,
    "qwen2_5_omni": tiny_qwen2_5_omni,
    "qwen2_audio": tiny_qwen2_audio,
}
