"""The data rooms with types that have no file of facts: from a sample with a picture to a step on it."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionProcessor,
    Glm4vImageProcessorPil,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessorPil,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    PixtralImageProcessorPil,
    PixtralProcessor,
    PreTrainedConfig,
)

from mmpeft.core.errors import ModelError
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.types import Media
from mmpeft.methods.attach import get_peft_model
from tests.families.models import FIRST_CLASS
from tests.families.samples import picture, sample_of
from tests.families.shrink import IMAGE, PATCH, tiny_config
from tests.families.tiled import _tokenizer


def chatml(image):
    """ChatML with `image` where a picture stands."""
    return (
        "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{%- for item in message['content'] -%}"
        "{%- if item['type'] == 'image' -%}{{ '" + image + "' }}{%- else -%}{{ item['text'] }}{%- endif -%}"
        "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


def pixtral():
    return PixtralProcessor(
        image_processor=PixtralImageProcessorPil(size={"longest_edge": IMAGE}, patch_size=PATCH),
        tokenizer=_tokenizer(chatml("[IMG]"), special=("[IMG]", "[IMG_BREAK]", "[IMG_END]")),
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=chatml("[IMG]"),
    ), {"image_token_id": "[IMG]"}


def glm4v():
    tokens = {
        "image_token_id": "<|image|>",
        "video_token_id": "<|video|>",
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
    }
    template = chatml("<|begin_of_image|><|image|><|end_of_image|>")
    size = {"shortest_edge": 256, "longest_edge": 2048}
    return Glm4vProcessor(
        image_processor=Glm4vImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size),
        video_processor=Glm4vVideoProcessor(patch_size=PATCH, merge_size=2),
        tokenizer=_tokenizer(template, special=tuple(tokens.values())),
        chat_template=template,
    ), tokens


def aya_vision():
    special = ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL")
    side = {"height": IMAGE, "width": IMAGE}
    return AyaVisionProcessor(
        image_processor=GotOcr2ImageProcessorPil(size=side, crop_to_patches=False),
        tokenizer=_tokenizer(chatml("<image>"), special=special),
        patch_size=PATCH,
        img_size=IMAGE,
        downsample_factor=2,
        chat_template=chatml("<image>"),
    ), {"image_token_id": "<|IMG_PATCH|>"}


def of_family(name):
    """The processor of a first-class family that other types use too, and what it has to agree on with a model."""
    model, processor = FIRST_CLASS[name]()
    tokens = {
        key: processor.tokenizer.convert_ids_to_tokens(value)
        for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        if (value := getattr(model.config, key, None)) is not None
    }
    vision = model.config.vision_config
    sizes = {key: getattr(vision, key) for key in ("image_size", "patch_size") if hasattr(vision, key)}
    return processor, tokens, sizes


def fitted(model_type, processor, tokens, sizes):
    """A tiny model of the type for this processor's tokens and pictures."""
    config = tiny_config(model_type)
    parts = [part for name in config.sub_configs if isinstance(part := getattr(config, name), PreTrainedConfig)]
    known = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    for part in (config, *parts):
        for name, value in {**known, "vocab_size": len(processor.tokenizer) + 16}.items():
            if hasattr(part, name):
                setattr(part, name, value)
    for name, value in sizes.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config).eval()


CASES = {
    "mistral3": pixtral,
    "glm4v": glm4v,
    "aya_vision": aya_vision,
    "vipllava": lambda: of_family("llava"),
    "qianfan_ocr": lambda: of_family("internvl"),
    "exaone4_5": lambda: of_family("qwen2_5_vl"),
    "qwen3_vl_moe": lambda: of_family("qwen3_vl"),
    "qwen3_5_moe": lambda: of_family("qwen3_vl"),
}


@pytest.mark.parametrize("model_type", CASES)
def test_a_sample_with_a_picture_trains_projector_and_language_model(model_type):
    processor, tokens, *sizes = CASES[model_type]()
    model = get_peft_model(
        fitted(model_type, processor, tokens, sizes[0] if sizes else {}), {"projector": "full", "language": {"r": 4}}
    )
    rows = [
        encode_sample(
            processor, sample_of("<image>\nWhat?", "a cat", images=1), Media(images=[picture((40, 32), seed)])
        )
        for seed in range(2)
    ]
    for row in rows:
        assert processor.tokenizer.decode(row["labels"][row["labels"] != -100]).startswith("a cat")
    batch = MultimodalCollator(processor)(rows)
    assert "logits_to_keep" in batch
    every = MultimodalCollator(processor, supervised_only=False)(rows)
    torch.testing.assert_close(model(**batch).loss, model(**every).loss)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_processor_that_does_not_say_what_it_writes_is_refused():
    processor = Idefics2Processor(
        image_processor=Idefics2ImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 32}),
        tokenizer=_tokenizer(chatml("<image>"), special=("<image>", "<fake_token_around_image>")),
        image_seq_len=4,
        chat_template=chatml("<image>"),
    )
    with pytest.raises(ModelError, match="Idefics2Processor does not say what it writes in the place of a medium"):
        encode_sample(processor, sample_of("<image>\nWhat?", "a", images=1), Media(images=[picture((32, 32))]))
