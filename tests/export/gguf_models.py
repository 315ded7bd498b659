"""Tiny models on disk whose tokenizers llama.cpp can read, and what of a GGUF file is looked at."""

import json

import gguf
from tokenizers import Tokenizer
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from mmpeft.export.gguf import write_gguf
from mmpeft.export.sources import find_source
from tests.families.models import MODELS
from tests.tiny import IMAGE_SIZE, IMAGE_TOKENS, PATCH_SIZE, tiny_clip_config, tiny_llama_config, tiny_processor

NEVER = "ÀÁ"
"""Bytes 0xC0 and 0xC1, which UTF-8 never has: their places are free for tokens that are merged."""


def mergeable(model, processor):
    """The same with two merges and GPT-2's way to cut text: llama.cpp reads no tokenizer without merges."""
    tokenizer = processor.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    words = backend["model"]["vocab"]
    backend["model"]["merges"] = [["Ġ", "t"], ["Ċ", "Ċ"]]
    for byte, (first, second) in zip(NEVER, backend["model"]["merges"], strict=True):
        words[first + second] = words.pop(byte)
    backend["pre_tokenizer"]["use_regex"] = True
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    return model.eval(), processor


def text_config(kind, size):
    """A tiny language model's configuration of a type."""
    sizes = {key: value for key, value in tiny_llama_config(size).to_dict().items() if key != "model_type"}
    return tiny_llama_config(size) if kind == "llama" else Qwen2Config(**{**sizes, "layer_types": None})


def llava_of(kind, *, tied=True, **changes):
    """A tiny LLaVA on a language model of a type, and its processor."""
    processor = tiny_processor()
    language = text_config(kind, len(processor.tokenizer))
    language.tie_word_embeddings = tied
    config = LlavaConfig(
        text_config=language.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=tied,
        **{"vision_config": tiny_clip_config().to_dict(), "vision_feature_layer": -1, **changes},
    )
    model = LlavaForConditionalGeneration(config)
    # With initial weights each token looks at all others alike, and the order of rows would make no difference.
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight.data *= 15
        layer.self_attn.k_proj.weight.data *= 15
    return mergeable(model, processor)


def siglip_llava(kind, **changes):
    """A tiny LLaVA on a SigLIP tower, and its processor."""
    tower = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    options = {"vision_config": tower.to_dict(), "vision_feature_select_strategy": "full", **changes}
    model, processor = llava_of(kind, **options)
    processor.image_processor = SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor.num_additional_image_tokens, processor.vision_feature_select_strategy = 0, "full"
    return model, processor


def tiny(family):
    """A tiny model of a family and its processor."""
    model, processor = mergeable(*MODELS[family]())
    if family == "qwen2_5_vl":
        model.config.vision_config.window_size = 112
    return model, processor


def saved(made, folder):
    """Where a model and its processor lie."""
    model, processor = made
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def written(source, out, **options):
    """A directory's model or adapter as GGUF files."""
    return write_gguf(find_source(source), out, **options)


class Read:
    """A GGUF file's keys, types of tensors, and numbers as float32."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.shapes = {tensor.name: tuple(int(side) for side in reversed(tensor.shape)) for tensor in reader.tensors}
        self.numbers = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[tensor.name])
            for tensor in reader.tensors
        }
