"""LoRA on experts: on the language model alone, the same after reloading in plain PEFT, and merged."""

import copy
import logging

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mmpeft.core.errors import RecipeError
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.methods.plan import base_name, describe_training
from tests.families.inputs import inputs_of
from tests.families.shrink import tiny_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

BOTH = {"r": 2, "target_parameters": EXPERTS}
"""Attention and what else is linear, and the experts."""

# aria's experts lie transposed; dots3_note's tower has experts too; peft rewrites the targets of glm4v_moe.
TYPES = ["qwen3_vl_moe", "qwen3_5_moe", "aria", "dots3_note", "glm4v_moe"]


def trained(model_type, train):
    """The adapter after one large step, its inputs and an untouched base."""
    model = tiny_model(model_type)
    base, batch = copy.deepcopy(model), inputs_of(model).batch
    adapted = get_peft_model(model, train)
    adapted(**batch).loss.backward()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    torch.optim.SGD(weights, lr=1.0).step()
    return adapted.eval(), batch, base


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("train", [BOTH, {**BOTH, "target_modules": []}], ids=["both", "experts"])
def test_experts_train_and_load_again_in_plain_peft(model_type, train, tmp_path):
    adapted, batch, base = trained(model_type, {"language": train})
    reached = {base_name(name) for name, weight in adapted.named_parameters() if weight.grad is not None}
    assert any(".experts." in name for name in reached)
    assert any(".q_proj." in name or ".q_a_proj." in name for name in reached) == ("target_modules" not in train)
    after = logits(adapted, batch)
    assert not torch.equal(after, logits(base, batch))
    save_adapter(adapted, tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, batch), after, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", TYPES)
def test_merged_experts_answer_as_the_adapter_does(model_type):
    adapted, batch, _ = trained(model_type, {"language": BOTH})
    after = logits(adapted, batch)
    torch.testing.assert_close(logits(adapted.merge_and_unload(), batch), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_fresh_adapter_on_experts_changes_no_logit(model_type):
    model = tiny_model(model_type)
    batch = inputs_of(model).batch
    before = logits(model, batch)
    torch.testing.assert_close(logits(get_peft_model(model, {"language": BOTH}), batch), before, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", TYPES)
def test_no_other_part_is_reached(model_type, tmp_path):
    adapted = get_peft_model(tiny_model(model_type), {"language": BOTH})
    spec = family_of(adapted)
    parts = {spec.part_of(base_name(name)) for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert parts == {"language"}
    save_adapter(adapted, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {spec.part_of(base_name(name)) for name in stored} == {"language"}


def test_a_tower_has_experts_of_its_own_rank():
    train = {"vision": {"r": 3, "target_parameters": EXPERTS}, "language": {"r": 2, "target_parameters": EXPERTS}}
    adapted = get_peft_model(tiny_model("dots3_note"), train)
    shapes = {
        (family_of(adapted).part_of(base_name(name)), weight.shape[0])
        for name, weight in adapted.named_parameters()
        if ".experts." in name and ".lora_A." in name
    }
    assert shapes == {("vision", 3 * 4), ("language", 2 * 4)}


def test_layers_to_transform_counts_for_experts():
    adapted = get_peft_model(tiny_model("qwen3_5_moe"), {"language": {**BOTH, "layers_to_transform": [1]}})
    layers = {name.split(".layers.")[1].split(".")[0] for name, _ in adapted.named_parameters() if ".lora_" in name}
    assert layers == {"1"}


def test_the_plan_counts_the_base_without_the_adapter():
    train = {"language": BOTH}
    adapted = get_peft_model(tiny_model("qwen3_vl_moe"), train)
    plan = describe_training(adapted, train)
    assert plan.total == sum(weight.numel() for weight in tiny_model("qwen3_vl_moe").parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_dropout": 0.1}, r"train.language.lora_dropout: 0.1 does not go with target_parameters"),
        ({"use_dora": True}, r"train.language.use_dora: True does not go with"),
        ({"init_lora_weights": "pissa"}, r"'pissa' decomposes linear layers, not the experts"),
        ({"target_parameters": "experts.down_proj"}, r"expected a list, as \[experts.down_proj\]"),
        (
            {"target_parameters": ["experts.up_proj"]},
            r"ends in 'experts.up_proj' \(it has: experts.down_proj, experts.gate_up_proj\)",
        ),
        ({"target_parameters": ["q_proj.weight"]}, r"linear layers are named in target_modules"),
    ],
)
def test_what_cannot_be_done_to_experts_is_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        get_peft_model(tiny_model("qwen3_vl_moe"), {"language": {**BOTH, **change}})


def test_a_model_without_experts_says_so(llava):
    with pytest.raises(RecipeError, match=r"it has none, so no experts"):
        get_peft_model(llava, {"language": BOTH})


def test_where_peft_takes_linear_layers_for_experts_they_are_left_out_and_named(caplog):
    with caplog.at_level(logging.WARNING):
        adapted = get_peft_model(tiny_model("glm4v_moe"), {"language": {"r": 2}})
    assert "leaves out the linear layers down_proj, gate_proj, up_proj" in caplog.text
    names = [name for name, _ in adapted.named_parameters() if ".lora_" in name]
    assert names
    assert not any(".mlp." in name for name in names)


def test_naming_such_layers_is_refused():
    with pytest.raises(RecipeError, match=r"peft takes gate_proj as words for all experts"):
        get_peft_model(tiny_model("glm4v_moe"), {"language": {"r": 2, "target_modules": ["q_proj", "gate_proj"]}})


@pytest.mark.parametrize("model_type", TYPES)
def test_gradient_checkpointing_gives_experts_the_same_gradients(model_type):
    def gradients(checkpointing):
        model = tiny_model(model_type)
        batch = inputs_of(model).batch
        adapted = get_peft_model(model, {"language": BOTH}).train()
        torch.manual_seed(0)
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.1)
        if checkpointing:
            adapted.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        adapted(**batch, use_cache=False).loss.backward()
        return {name: weight.grad for name, weight in adapted.named_parameters() if weight.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert any(".experts." in name and gradient.any() for name, gradient in plain.items())
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "aria"])
def test_experts_in_bfloat16_train_in_float32(model_type):
    model = tiny_model(model_type).to(torch.bfloat16)
    batch = inputs_of(model).batch
    adapted = get_peft_model(model, {"language": BOTH})
    weights = {name: weight for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    adapted(**batch).loss.backward()
    assert any(".experts." in name and weight.grad.any() for name, weight in weights.items())
