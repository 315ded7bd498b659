import copy

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    InternVLConfig,
    LlavaNextConfig,
    Mistral3Config,
)

from mmpeft.core.errors import ModelError
from mmpeft.families import llava as llava_family
from mmpeft.families.generic import inspect_model
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter


def test_inspection_finds_the_parts_that_the_family_states(llava):
    spec = inspect_model(llava)
    assert {part: set(paths) for part, paths in spec.parts.items()} == {
        part: set(paths) for part, paths in llava_family.SPEC.parts.items()
    }


def test_a_model_without_an_image_tower_is_refused_with_what_was_found():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel .*expected an image tower"):
        inspect_model(model)


TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def tiny_internvl():
    vision = {**VISION, "image_size": [16, 16], "patch_size": [8, 8]}
    return InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **TEXT}, image_token_id=98)


def tiny_llava_next():
    vision = {"model_type": "clip_vision_model", **VISION}
    return LlavaNextConfig(vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_index=98)


def tiny_idefics3():
    return Idefics3Config(vision_config=VISION, text_config={"model_type": "llama", **TEXT}, image_token_id=98)


def tiny_mistral3():
    vision = {"model_type": "pixtral", **VISION, "head_dim": 8}
    return Mistral3Config(vision_config=vision, text_config={"model_type": "mistral", **TEXT}, image_token_index=98)


@pytest.mark.parametrize("make", [tiny_internvl, tiny_llava_next, tiny_idefics3, tiny_mistral3])
def test_a_type_without_a_file_of_facts_trains_and_its_adapter_loads_in_plain_peft(make, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(make()).eval()
    base = copy.deepcopy(model)
    assert {"vision", "projector", "language"} <= set(family_of(model).parts)
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
    adapted = get_peft_model(model, {"projector": "full", "language": {"r": 4}})
    torch.testing.assert_close(adapted(input_ids=tokens).logits, before, rtol=0, atol=0)
    optimizer = torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=1.0)
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = adapted.eval()(input_ids=tokens).logits
    assert not torch.equal(after, before)
    save_adapter(adapted, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(input_ids=tokens).logits, after, rtol=0, atol=0)
