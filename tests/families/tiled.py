"""Tiny real models of the families outside the Qwen line, with their real processors: random weights, no network."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

from tests.tiny import tiny_tokenizer

PATCH_SIZE = 8
GRIDS = [[16, 16], [16, 32], [32, 16], [32, 32]]
"""Sizes to which LLaVA-NeXT and LLaVA-OneVision tile a picture; a tile is 16 px, so 4 tokens."""

NEXT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '[INST] ' }}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>\n' }}{%- endfor -%}"
    "{%- for item in message['content'] if item['type'] == 'text' -%}{{ item['text'] }}{%- endfor -%}{{ ' [/INST]' }}"
    "{%- else -%}{{ ' ' + message['content'][0]['text'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
)
"""Of a Mistral-based LLaVA 1.6: the pictures of a turn first, then its text."""

ONEVISION_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{%- for item in message['content'] if item['type'] == 'image' -%}{{ '<image>' }}{%- endfor -%}"
    "{%- for item in message['content'] if item['type'] == 'video' -%}{{ '<video>' }}{%- endfor -%}"
    "{%- for item in message['content'] if item['type'] == 'text' -%}{{ '\n' + item['text'] }}{%- endfor -%}"
    "{{ '<|im_end|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

INTERNVL_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<IMG_CONTEXT>\n' }}"
    "{%- elif item['type'] == 'video' -%}{{ '<video>\n' }}"
    "{%- else -%}{{ item['text'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- else -%}{{ item['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def _tokenizer(
    chat_template: str | None, *, named: dict[str, str] | None = None, special: tuple[str, ...] = (), **tokens: str
) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a family's special tokens; `named` ones are also its attributes."""
    plain = tiny_tokenizer(image_token=False, chat_template=chat_template)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        chat_template=chat_template,
        pad_token="<|pad|>",
        extra_special_tokens=named or {},
        **{"eos_token": "<|im_end|>", **tokens},
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast, model_type: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **fields,
    }


def _vision(image_size: int, **fields: Any) -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": PATCH_SIZE,
        **fields,
    }


def _built(model_class: Callable[[Any], Any], config: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return model_class(config).eval()


def tiny_llava_next(seed: int = 0) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    tokenizer = _tokenizer(NEXT_TEMPLATE, special=("<image>",))
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=GRIDS
    )
    processor = LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=NEXT_TEMPLATE,
    )
    config = LlavaNextConfig(
        vision_config=_vision(16, model_type="clip_vision_model", projection_dim=16),
        text_config=_text(tokenizer, "mistral"),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=GRIDS,
        image_seq_length=4,
    )
    return _built(LlavaNextForConditionalGeneration, config, seed), processor


def tiny_llava_onevision(seed: int = 0) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    tokenizer = _tokenizer(ONEVISION_TEMPLATE, special=("<image>", "<video>"))
    side = {"height": 16, "width": 16}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=GRIDS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION_TEMPLATE,
    )
    config = LlavaOnevisionConfig(
        vision_config=_vision(16, model_type="siglip_vision_model", vision_use_head=False),
        text_config=_text(tokenizer, "qwen2"),
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=GRIDS,
    )
    return _built(LlavaOnevisionForConditionalGeneration, config, seed), processor


def tiny_internvl(seed: int = 0) -> tuple[InternVLForConditionalGeneration, InternVLProcessor]:
    """32 px a tile: 16 patches, of which the projector makes 4 tokens."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(INTERNVL_TEMPLATE, named=named)
    side = {"height": 32, "width": 32}
    processor = InternVLProcessor(
        GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    )
    config = InternVLConfig(
        vision_config={**_vision(32), "image_size": [32, 32], "patch_size": [PATCH_SIZE, PATCH_SIZE]},
        text_config=_text(tokenizer, "qwen2"),
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    return _built(InternVLForConditionalGeneration, config, seed), processor


_IDEFICS_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>")
_IDEFICS_ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))


def _idefics_config(config_class: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    return config_class(
        vision_config=_vision(32),
        text_config=_text(tokenizer, "llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )


def tiny_smolvlm(seed: int = 0) -> tuple[SmolVLMForConditionalGeneration, SmolVLMProcessor]:
    """32 px a tile: 16 patches, of which the connector makes 4 tokens."""
    tokenizer = _tokenizer(
        DEFAULT_CHAT_TEMPLATE,
        special=(*_IDEFICS_TOKENS, "<video>", *_IDEFICS_ROWS),
        eos_token="<end_of_utterance>",
    )
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessorPil(**sizes),
        tokenizer,
        SmolVLMVideoProcessor(**{**sizes, "size": {"longest_edge": 32}}),
        image_seq_len=4,
        chat_template=DEFAULT_CHAT_TEMPLATE,
    )
    return _built(SmolVLMForConditionalGeneration, _idefics_config(SmolVLMConfig, tokenizer), seed), processor


def tiny_idefics3(seed: int = 0) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    tokenizer = _tokenizer(
        DEFAULT_CHAT_TEMPLATE, special=(*_IDEFICS_TOKENS, *_IDEFICS_ROWS), eos_token="<end_of_utterance>"
    )
    image_processor = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=DEFAULT_CHAT_TEMPLATE)
    return _built(Idefics3ForConditionalGeneration, _idefics_config(Idefics3Config, tokenizer), seed), processor


def tiny_gemma3(seed: int = 0) -> tuple[Gemma3ForConditionalGeneration, Gemma3Processor]:
    """A sliding-window layer and a full one; 32 px, 16 patches pooled into 4 tokens."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = _tokenizer(
        GEMMA_TEMPLATE, named=named, special=("<start_of_turn>", "<end_of_turn>"), bos_token="<bos>", eos_token="<eos>"
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=4,
        chat_template=GEMMA_TEMPLATE,
    )
    text = _text(
        tokenizer,
        "gemma3_text",
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = Gemma3Config(
        vision_config=_vision(32, model_type="siglip_vision_model", vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    model = _built(Gemma3ForConditionalGeneration, config, seed)
    # Zero in a fresh model, which would then not see its pictures.
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    return model, processor


def tiny_paligemma(seed: int = 0) -> tuple[PaliGemmaForConditionalGeneration, PaliGemmaProcessor]:
    tokenizer = _tokenizer(None, bos_token="<bos>", eos_token="<eos>")
    image_processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    config = PaliGemmaConfig(
        vision_config=_vision(16, model_type="siglip_vision_model", vision_use_head=False, projection_dim=32),
        text_config=_text(processor.tokenizer, "gemma"),
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return _built(PaliGemmaForConditionalGeneration, config, seed), processor


TILED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_llava_onevision,
    "internvl": tiny_internvl,
    "smolvlm": tiny_smolvlm,
    "gemma3": tiny_gemma3,
    "paligemma": tiny_paligemma,
}
