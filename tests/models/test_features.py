"""Which outputs of frozen parts can be kept, what they are called, and when they count as the same."""

import copy

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from mmpeft.methods.attach import get_peft_model
from mmpeft.models.features import FeaturePlan, Unplanned, placeholders, plan_features
from mmpeft.models.feeding import join
from tests.models.test_composed import ask, own
from tests.tiny import tiny_llama_config, tiny_llava, tiny_processor

PROJECTOR = {"projector": "full"}
LORA = {"language": {"r": 2, "lora_alpha": 4}}


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


@pytest.fixture
def model(processor):
    return tiny_llava(processor)


def pixels(seed=0):
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def test_a_frozen_projector_is_kept_with_the_tower(model):
    plan = plan_features(model, LORA)
    assert (plan.cut, plan.parts) == ("output", ("vision", "audio", "projector"))
    found = plan.compute(model, pixels())
    with torch.no_grad():
        expected = torch.cat(model.model.get_image_features(**pixels(), return_dict=True).pooler_output)
    assert found.keys() == {"image/pooler_output[]"}
    assert torch.equal(found["image/pooler_output[]"], expected)


def test_of_a_projector_that_trains_its_input_is_kept(model):
    plan = plan_features(get_peft_model(model, PROJECTOR), PROJECTOR)
    assert (plan.cut, plan.parts) == ("input", ("vision", "audio"))
    found = plan.compute(model, pixels())["image/model.multi_modal_projector"]
    # Without the tower's first token, which the projector never sees.
    assert found.shape == (2, 4, model.config.vision_config.hidden_size)
    assert not found.requires_grad


def test_text_alone_has_no_features(model):
    assert plan_features(model, LORA).compute(model, {}) == {}


@pytest.mark.parametrize("train", [{"vision": "full"}, {"vision": {"r": 2}, **PROJECTOR}])
def test_a_tower_that_trains_is_not_kept(model, train):
    assert plan_features(model, train) == Unplanned("the vision tower trains, so its outputs change from step to step")


def test_dropout_in_a_frozen_tower_is_named(processor):
    model = tiny_llava(processor)
    model.model.vision_tower.encoder.layers[0].self_attn.dropout = 0.1
    found = plan_features(model, LORA)
    assert isinstance(found, Unplanned)
    assert "model.vision_tower.encoder.layers.0.self_attn drops out (dropout=0.1)" in found.reason


def test_dropout_of_the_language_model_is_its_own_affair(model):
    adapted = get_peft_model(model, {"language": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5}})
    assert isinstance(plan_features(adapted, LORA), FeaturePlan)


def test_a_tower_that_joins_pictures_in_a_row_is_not_kept(processor):
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_llama_config(len(processor.tokenizer)).to_dict())
    found = plan_features(LlavaForConditionalGeneration(config), LORA)
    assert found == Unplanned("pixtral towers lay the pictures of a batch side by side in one row")


class TestIdentity:
    def test_it_is_that_of_the_weights_in_any_wrapping(self, processor):
        plain, adapted = tiny_llava(processor), get_peft_model(tiny_llava(processor), {**PROJECTOR, **LORA})
        one = plan_features(plain, PROJECTOR).identity(plain)
        assert one == plan_features(adapted, PROJECTOR).identity(adapted)
        # A projector that an adapter holds has the weights that it began with.
        assert plan_features(plain, LORA).identity(plain) == plan_features(adapted, LORA).identity(adapted)

    def test_other_weights_of_the_tower_are_another(self, model):
        before = plan_features(model, PROJECTOR).identity(model)
        with torch.no_grad():
            model.model.vision_tower.encoder.layers[0].mlp.fc1.bias[0] += 1e-6
        assert plan_features(model, PROJECTOR).identity(model) != before

    def test_the_projector_counts_where_it_is_kept_too(self, model):
        before = plan_features(model, PROJECTOR).identity(model), plan_features(model, LORA).identity(model)
        adapted = get_peft_model(model, PROJECTOR)
        with torch.no_grad():
            next(p for name, p in adapted.named_parameters() if p.requires_grad).add_(1)
        assert plan_features(adapted, PROJECTOR).identity(adapted) == before[0]
        assert plan_features(adapted, LORA).identity(adapted) != before[1]

    def test_the_language_model_does_not_count(self, model):
        before = plan_features(model, LORA).identity(model)
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        assert plan_features(model, LORA).identity(model) == before

    def test_cut_layer_and_number_format_count(self, model):
        found = {
            plan_features(model, LORA).identity(model),
            plan_features(model, PROJECTOR).identity(model),
            plan_features(model, PROJECTOR).identity(model, torch.bfloat16),
        }
        other = copy.deepcopy(model)
        other.config.vision_feature_layer = -2
        found.add(plan_features(other, PROJECTOR).identity(other))
        half = copy.deepcopy(model).to(torch.bfloat16)
        found.add(plan_features(half, PROJECTOR).identity(half))
        assert len(found) == 5


def test_features_under_autocast_are_those_that_the_tower_gives_under_it(model):
    plan = plan_features(model, PROJECTOR)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = plan.compute(model, pixels())
        expected = model.model.get_image_features(**pixels(), return_dict=True).pooler_output
        with plan.feed(model, [found]):
            fed = model.model.get_image_features(**pixels(1), return_dict=True).pooler_output
    assert fed[0].dtype == expected[0].dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(fed, expected, strict=True))


def test_what_is_put_before_the_models_methods_goes_again(model):
    plan = plan_features(model, PROJECTOR)
    features = plan.compute(model, pixels())
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="stopped"), plan.feed(model, [features]):
        raise RuntimeError("stopped")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not model.model.multi_modal_projector._forward_pre_hooks


def test_films_of_unlike_lengths_stand_in_one_row():
    first, second = torch.arange(6.0).view(1, 3, 2), torch.arange(10.0, 30.0).view(2, 5, 2)
    assert join([first, second]).shape == (1, 13, 2)
    assert torch.equal(join([first, second])[0], torch.cat([first[0], *second]))


def test_placeholders_take_no_memory():
    shapes = {"pixel_values": ((4, 5, 3, 336, 336), torch.float32), "input_features": ((2, 128, 3000), torch.float32)}
    made = placeholders(shapes, torch.device("cpu"))
    assert made["pixel_values"].shape == (4, 5, 1, 1, 1)
    assert made["input_features"].shape == (2, 128, 3000)
    assert all(tensor.untyped_storage().nbytes() == 4 for tensor in made.values())


@pytest.mark.parametrize("train", [PROJECTOR, LORA], ids=["projector", "lora"])
def test_a_composed_model_takes_its_features_back(train):
    model, processor = own()
    inputs = {**ask(processor), "labels": ask(processor)["input_ids"]}
    adapted = get_peft_model(model, train)
    plan = plan_features(adapted, train)
    features = plan.compute(adapted, {"pixel_values": inputs["pixel_values"]})
    expected = adapted(**inputs).loss
    with plan.feed(adapted, [features]):
        found = adapted(**{**inputs, "pixel_values": torch.zeros(1, 3, 1, 1)}).loss
    assert torch.equal(found, expected)
