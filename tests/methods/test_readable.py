"""Adapters of model types whose tensors PEFT renames while it loads them."""

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mmpeft.core.errors import RecipeError
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import carry_over, initial_lora, save_adapter
from mmpeft.methods.readable import stored_modules
from tests.families.inputs import inputs_of
from tests.families.shrink import tiny_model

RENAMED = "deepseek_ocr2"


def trained(train):
    model = tiny_model(RENAMED)
    base, batch = copy.deepcopy(model), inputs_of(model).batch
    adapted = get_peft_model(model, train)
    initial = initial_lora(adapted)
    adapted(**batch).loss.backward()
    torch.optim.SGD([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1).step()
    return adapted.eval(), initial, base, batch


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def test_most_adapters_are_stored_under_their_own_names(llava):
    assert stored_modules(get_peft_model(llava, {"language": {"r": 2}, "projector": "full"})) == {}


def test_tensors_are_stored_under_the_names_that_peft_turns_into_todays(tmp_path):
    adapted, _, _, _ = trained({"language": {"r": 2}})
    save_adapter(adapted, tmp_path / "adapter")
    names = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert not any(".language_model." in name for name in names)


@pytest.mark.parametrize(
    "more", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["lora", "dora", "pissa"]
)
def test_plain_peft_finds_them(more, tmp_path):
    adapted, initial, base, batch = trained({"projector": "full", "language": {"r": 2, **more}})
    after = logits(adapted, batch)
    assert not torch.allclose(after, logits(base, batch))
    save_adapter(adapted, tmp_path / "adapter", initial=initial)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, batch), after, rtol=1e-5, atol=1e-5)


def test_the_next_stage_finds_them(tmp_path):
    train = {"projector": "full", "language": {"r": 2}}
    adapted, _, base, batch = trained(train)
    save_adapter(adapted, tmp_path / "adapter")
    following = get_peft_model(base, train).eval()
    assert carry_over(following, tmp_path / "adapter")
    torch.testing.assert_close(logits(following, batch), logits(adapted, batch), rtol=0, atol=0)


def test_matrices_that_no_name_leads_to_are_refused_with_the_way_out():
    model = tiny_model("inkling2")
    message = r"peft would not find 4 of the \d+ LoRA matrices .*exclude_modules` \(they end in weight_proj\)"
    with pytest.raises(RecipeError, match=message):
        get_peft_model(model, {"language": {"r": 2}})
    get_peft_model(tiny_model("inkling2"), {"language": {"r": 2, "exclude_modules": ["weight_proj"]}})
