"""Tiny vision encoders and language models of every architecture that compose_model has to take."""

from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    ViTConfig,
)

from tests.tiny import IMAGE_SIZE, PATCH_SIZE, tiny_clip_config, tiny_llama_config

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}

VISIONS = {
    "clip": tiny_clip_config,
    "siglip": lambda: SiglipVisionConfig(**_VISION, intermediate_size=32),
    "vit": lambda: ViTConfig(**_VISION, intermediate_size=32),
    "dinov2": lambda: Dinov2Config(**_VISION, mlp_ratio=2),
    "dinov2_registers": lambda: Dinov2WithRegistersConfig(**_VISION, mlp_ratio=2, num_register_tokens=4),
}

_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2}
_HEAD: dict[str, Any] = {**_GROUPED, "head_dim": 8}

LANGUAGES = {
    "llama": tiny_llama_config,
    "qwen2": lambda size: Qwen2Config(**_GROUPED, vocab_size=size, tie_word_embeddings=False),
    "qwen3": lambda size: Qwen3Config(**_HEAD, vocab_size=size, tie_word_embeddings=True),
    "gemma": lambda size: GemmaConfig(**_HEAD, vocab_size=size),
    "gemma2": lambda size: Gemma2Config(**_HEAD, vocab_size=size, final_logit_softcapping=0.05),
    "gemma3": lambda size: Gemma3TextConfig(**_HEAD, vocab_size=size),
    "gpt2": lambda size: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=512, vocab_size=size, bos_token_id=None, eos_token_id=None
    ),
    "phi": lambda size: PhiConfig(**_TEXT, vocab_size=size, tie_word_embeddings=False),
}

NATIVE_VISIONS = {"clip", "siglip", "vit", "dinov2"}
NATIVE_LANGUAGES = {"llama", "qwen2", "qwen3", "gemma", "gemma3"}
"""The others cap their logits (gemma2), name their embeddings otherwise and tie them (gpt2), or bias the head (phi)."""


def tiny_vision(name: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModel.from_config(VISIONS[name]()).eval()


def tiny_language(name: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LANGUAGES[name](len(tokenizer))).eval()
    # Heads and embeddings as large as a trained model's, so that a cap or a bias shows.
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(5)
        if head.bias is not None:
            head.bias.normal_()
    return model
