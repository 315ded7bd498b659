"""Every type of language model that packed rows are allowed for gives the gradients of its samples one by one."""

import pytest
import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.packing import PackedCollator
from mmpeft.data.types import Media
from mmpeft.models.tree_attention import EXACT, NAME, tree_attention_on
from tests.families.samples import picture, sample_of
from tests.tiny import IMAGE_TOKENS, tiny_clip_config, tiny_processor

INSIDE = {"gemma3_text"} | {name for name in EXACT if name.endswith(("_vl_text", "_omni_text"))}
"""Tested inside the families that they come with: tests/families/test_packing.py."""


def llava_around(model_type, processor):
    """A tiny LLaVA with a language model of that type, its weights large enough for attention to matter."""
    sizes = {
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "phi3":
        sizes |= {"rope_scaling": None}
    text = AutoConfig.for_model(model_type, **sizes)
    config = LlavaConfig(
        vision_config=tiny_clip_config().to_dict(),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.mul_(4)
    return model


def gradients(model, batch, count):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=count).loss
    loss.backward()
    return loss.item(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("model_type", sorted(EXACT - INSIDE))
def test_loss_and_gradients_are_those_of_the_samples_one_by_one(model_type):
    processor = tiny_processor()
    model = llava_around(model_type, processor)
    assert model.config.text_config._attn_implementation == "sdpa"
    shown = Media(images=[picture((24, 24))])
    made = [
        (sample_of("<image>\nWhat is it?", "a cat", images=1), shown),
        (sample_of("1 + 1?", "2"), Media()),
        (sample_of("<image>\nWhich colour?", "red and blue", images=1), shown),
    ]
    rows = [encode_sample(processor, *each) for each in made]
    count = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    total, expected = 0.0, {}
    for row in rows:
        loss, found = gradients(model, MultimodalCollator(processor, supervised_only=False)([row]), count)
        total += loss
        for name, gradient in found.items():
            expected[name] = expected.get(name, 0) + gradient
    with tree_attention_on(model):
        assert model.config.text_config._attn_implementation == NAME
        loss, packed = gradients(model, PackedCollator(processor)(rows), count)
    assert loss == pytest.approx(total, rel=1e-5)
    assert packed.keys() == expected.keys()
    # Against the largest of all: a key's bias has none but noise, since softmax takes no notice of it.
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)
