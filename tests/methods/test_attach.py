import pytest
import torch
from peft import PeftModel
from PIL import Image

from mmpeft import get_peft_model
from mmpeft.core.errors import RecipeError
from mmpeft.methods.attach import freeze_carried
from mmpeft.methods.plan import base_name, describe_training
from tests.tiny import tiny_llava

ADAPTERS = {
    "projector": {"projector": "full"},
    "lora": {"language": {"r": 4}},
    "both": {"projector": "full", "language": {"r": 4, "lora_alpha": 8}},
    "vision": {"vision": {"r": 4}},
    "all": {"vision": {"r": 2}, "projector": "full", "language": {"r": 4}},
    "projector-lora": {"projector": {"r": 2}},
    "dora": {"projector": "full", "language": {"r": 4, "use_dora": True}},
    "rslora": {"language": {"r": 4, "use_rslora": True}},
    "gaussian": {"language": {"r": 4, "init_lora_weights": "gaussian"}},
    "pissa": {"projector": "full", "language": {"r": 4, "init_lora_weights": "pissa"}},
    "pissa-niter": {"language": {"r": 4, "init_lora_weights": "pissa_niter_4"}},
    "olora": {"language": {"r": 4, "init_lora_weights": "olora"}},
    "orthogonal": {"language": {"r": 4, "init_lora_weights": "orthogonal"}},
    "bias": {"vision": {"r": 4, "lora_bias": True}},
    "layers": {"language": {"r": 4, "layers_to_transform": 1}},
    "ranks": {"vision": {"r": 2, "lora_alpha": 4}, "language": {"r": 4, "lora_alpha": 16}},
}


def ask(processor):
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "描述这张图片"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    return processor(text=[text], images=[Image.linear_gradient("L").convert("RGB")], return_tensors="pt")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_changes_no_logit(name, processor):
    batch = ask(processor)
    before = tiny_llava(processor)(**batch).logits
    model = get_peft_model(tiny_llava(processor), ADAPTERS[name]).eval()
    # Initialisations that decompose the base's weights put them together again: equal to rounding.
    exact = not any(word in name for word in ("pissa", "olora", "orthogonal"))
    torch.testing.assert_close(model(**batch).logits, before, atol=0 if exact else 1e-6, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_just_the_parts_named_train(name, processor):
    train = ADAPTERS[name]
    model = get_peft_model(tiny_llava(processor), train)
    assert isinstance(model, PeftModel)
    plan = describe_training(model, train, 1e-3)
    for part in plan.parts:
        assert (part.trainable > 0) == (part.part in train), part
        assert (part.learning_rate is not None) == (part.part in train)
    assert plan.total == sum(p.numel() for p in tiny_llava(processor).parameters())


def test_the_projector_is_saved_by_its_leaves(llava):
    model = get_peft_model(llava, {"projector": "full"})
    assert sorted(model.peft_config["default"].modules_to_save) == [
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]


def test_batches_of_mixed_adapters_run(processor):
    """What leaf-level `modules_to_save` is for: the whole projector would raise TypeError here."""
    model = get_peft_model(tiny_llava(processor), ADAPTERS["both"]).eval()
    batch = ask(processor)
    double = {key: torch.cat([value, value]) for key, value in batch.items()}
    with torch.no_grad():
        logits = model(**double, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(logits[0], logits[1])


def test_a_full_tower_trains_in_place(llava):
    model = get_peft_model(llava, {"language": "full", "projector": "full"})
    assert model is llava
    trained = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"language_model", "multi_modal_projector"}


def test_a_full_tower_beside_lora_is_refused(llava):
    with pytest.raises(RecipeError, match="language is `full` and vision has LoRA; a stage writes either"):
        get_peft_model(llava, {"language": "full", "vision": {"r": 2}})


def test_an_unknown_part_is_named_with_its_nearest(llava):
    with pytest.raises(RecipeError, match=r"train.langauge: unknown part 'langauge'; did you mean 'language'\?"):
        get_peft_model(llava, {"langauge": {"r": 2}})


def test_a_part_that_the_model_lacks_names_the_modules_that_exist(llava):
    del llava.model.multi_modal_projector
    with pytest.raises(
        RecipeError, match=r"not one parameter of LlavaForConditionalGeneration matched .*the model has: "
    ):
        get_peft_model(llava, {"projector": "full"})


def test_an_adapter_on_an_adapter_is_refused(llava):
    model = get_peft_model(llava, {"projector": "full"})
    with pytest.raises(RecipeError, match="has an adapter already"):
        get_peft_model(model, {"projector": "full"})


def test_carried_parts_stay_in_the_adapter_and_stay_frozen(llava):
    model = get_peft_model(llava, {"language": {"r": 4}}, carried={"projector": "full"})
    held = {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert held
    assert not held & trained
    assert all(".lora_" in name for name in trained)


def test_freezing_again_after_peft_has_switched_all_on(llava):
    model = get_peft_model(llava, {"language": {"r": 4}}, carried={"projector": "full"})
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    freeze_carried(model, {"language": {"r": 4}})
    assert not any(p.requires_grad for n, p in model.named_parameters() if "multi_modal_projector" in base_name(n))


def test_trainable_weights_are_float32_on_a_half_precision_base(processor):
    model = get_peft_model(tiny_llava(processor).to(torch.bfloat16), ADAPTERS["both"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_layers_to_transform_is_kept_to(processor):
    model = get_peft_model(tiny_llava(processor), {"language": {"r": 4, "layers_to_transform": [1]}})
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 7
    assert all(".language_model.layers.1." in name for name in trained)


def test_what_peft_refuses_while_it_attaches_is_a_recipe_error(llava):
    with pytest.raises(
        RecipeError,
        match=r"peft cannot attach this adapter to Llava.*: .*matches neither A nor B",
    ):
        get_peft_model(llava, {"language": {"r": 4, "use_bdlora": {}}})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_more_directions_than_a_matrix_has_are_refused(llava, init):
    """PEFT trains such an adapter and then cannot read what it wrote."""
    with pytest.raises(
        RecipeError, match=r"train.language.r: 17 is above 16, the smaller side of .*k_proj; .* at most"
    ):
        get_peft_model(llava, {"language": {"r": 17, "init_lora_weights": init}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"train.language.r: 8 differs from 4, .*give r = 4, lora_alpha = 8"),
        ({"lora_alpha": 32}, r"train.language.lora_alpha: 32 differs from 8"),
        ({"use_rslora": True}, r"train.language.use_rslora: True differs from False"),
        ({"use_dora": True}, r"train.language.use_dora: True differs from False"),
        ({"init_lora_weights": "pissa"}, r"'pissa' begins anew, but an earlier stage has trained this LoRA"),
        ({"init_lora_weights": "olora"}, r"'olora' begins anew"),
    ],
)
def test_lora_of_an_earlier_stage_cannot_change_its_meaning(llava, change, message):
    """Its matrices would be read with another scale or over another base: other answers, and no error."""
    with pytest.raises(RecipeError, match=message):
        get_peft_model(llava, {"language": {"r": 4, **change}}, carried={"language": {"r": 4}})


@pytest.mark.parametrize(("now", "before"), [("full", {"r": 2}), ({"r": 2}, "full")])
def test_a_projector_trained_two_ways_is_refused(llava, now, before):
    with pytest.raises(RecipeError, match=r"train.projector: an earlier stage trained it .*cannot hold both"):
        get_peft_model(llava, {"projector": now}, carried={"projector": before})


def test_a_projector_trained_further_is_carried(llava):
    model = get_peft_model(llava, ADAPTERS["both"], carried={"projector": "full", "vision": "frozen"})
    assert isinstance(model, PeftModel)


@pytest.mark.parametrize("now", [{"r": 2}, {"r": 2, "lora_dropout": 0.2}])
def test_dropout_of_a_carried_part_does_not_bind_the_next_stage(llava, now):
    carried = {"language": {"r": 4, "lora_dropout": 0.1}}
    model = get_peft_model(llava, {"vision": now}, carried=carried)
    assert model.peft_config["default"].lora_dropout == now.get("lora_dropout", 0.0)
    assert any("language_model" in name and ".lora_A." in name for name, _ in model.named_parameters())
