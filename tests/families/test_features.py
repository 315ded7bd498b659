"""Kept features of frozen towers, given back: loss and gradients are those of running the towers, in each family."""

import dataclasses

import pytest
import torch
from torch import nn

from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.join_features import HEAVY
from mmpeft.data.packing import PackedCollator
from mmpeft.data.types import Media
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.features import FeaturePlan, placeholders, plan_features
from mmpeft.models.positions import with_positions
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.models import MODELS, SINGLE_TURN
from tests.families.samples import SIZES, every_medium, film, first_medium, picture, sample_of, sound
from tests.families.test_adapters import LORA, PROJECTOR, gradients, scattered
from tests.families.test_packing import PACKED, rows_of

TRAINS = {"projector": PROJECTOR, "lora": LORA, "both": {**PROJECTOR, **LORA}}


def rows(family, model, processor):
    """Every modality the family takes, odd sizes, several pictures in a sample, and text alone."""
    made = [*every_medium(model, processor), *(first_medium(model, number) for number in (1, 2))]
    if family not in SINGLE_TURN:
        made.append((sample_of("1 + 1?", "2"), Media()))
    if family not in SINGLE_TURN and "image" in family_of(model).modalities:
        # The large one has several windows of Qwen2.5's tower, whose order is not its own inverse.
        media = Media(images=[picture(size, number) for number, size in enumerate(((90, 70), SIZES[2]))])
        made.append((sample_of("<image> or <image>?", "the first", images=2), media))
    return [encode_sample(processor, *each) for each in made]


def media_of(row):
    return {key: value for key, value in row.items() if key not in ("input_ids", "labels") and "type_ids" not in key}


def kept(row, plan, model):
    """The sample as a data set gives it whose cache holds its features."""
    media = media_of(row)
    if not media:
        return row
    heavy = HEAVY & set(media)
    return {
        **{key: value for key, value in row.items() if key not in heavy},
        "features_key": "k",
        "features": plan.compute(model, media),
        "features_shapes": {key: (tuple(media[key].shape), media[key].dtype) for key in heavy},
    }


class Silent(nn.Module):
    """Stands where a tower ran, to show that none did."""

    def __call__(self, *args, **kwargs):
        raise AssertionError("a block of a tower ran")


def blocks(model):
    """The layers of the frozen towers."""
    found = []
    for name, module in model.named_modules():
        inside = any(path in name for part in ("vision", "audio") for path in family_of(model).parts.get(part, ()))
        if isinstance(module, nn.ModuleList) and inside and "deepstack" not in name:
            found.append(module)
    assert found
    return found


def fed_gradients(model, plan, batch):
    features = batch.pop("features")
    shapes = batch.pop("features_shapes")
    own = [(block, name, layer) for block in blocks(model) for name, layer in block.named_children()]
    for block, name, _ in own:
        block._modules[name] = Silent()
    try:
        with plan.feed(model, [each["tensors"] for each in features]):
            model.zero_grad()
            output = model(**batch, **placeholders(shapes, torch.device("cpu")))
    finally:
        for block, name, layer in own:
            block._modules[name] = layer
    output.loss.backward()
    return output.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.fixture(scope="module", params=sorted(MODELS))
def family(request):
    """(name, rows, a function that makes the model anew)"""
    torch.manual_seed(0)
    model, processor = MODELS[request.param]()
    return request.param, processor, rows(request.param, model, processor)


@pytest.mark.parametrize(
    "train", [*(pytest.param(train, marks=pytest.mark.slow) for train in ("projector", "lora")), "both"]
)
def test_loss_and_gradients_of_a_padded_batch_are_those_without_a_cache(family, train):
    name, processor, samples = family
    model = scattered(get_peft_model(MODELS[name]()[0], TRAINS[train])).train()
    plan = plan_features(model, TRAINS[train])
    assert isinstance(plan, FeaturePlan), plan
    assert plan.cut == ("output" if train == "lora" and name != "qwen2_audio" else "input")
    collate = MultimodalCollator(processor)
    # Films of InternVL stand among pictures; two kinds of media at once where the family takes them.
    expected = gradients(model, collate(samples))
    with torch.no_grad():
        loss = model(**collate(samples)).loss.item()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found, grads = fed_gradients(model, plan, dict(collate([kept(row, plan, model) for row in samples])))
    assert found == pytest.approx(loss, rel=1e-5)
    assert_same(grads, expected)
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    # What is not fed runs the towers as before.
    with torch.no_grad():
        assert model(**collate(samples)).loss.item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("train", ["lora", "both"])
@pytest.mark.parametrize("name", PACKED)
def test_loss_and_gradients_of_a_packed_row_are_those_without_a_cache(name, train):
    model, processor = MODELS[name]()
    samples = rows_of(name, processor)
    model = scattered(get_peft_model(model, TRAINS[train])).train()
    plan = plan_features(model, TRAINS[train])
    collate = PackedCollator(processor)
    with tree_attention_on(model):
        plain = with_positions(model, collate(samples))
        expected = gradients(model, plain)
        hits = [
            {**kept(row, plan, model), **({"features_key": str(n % 2)} if n in (0, 2, 4) else {})}
            for n, row in enumerate(samples)
        ]
        batch = with_positions(model, collate(hits))
        assert batch["input_ids"].shape == plain["input_ids"].shape
        _, grads = fed_gradients(model, plan, dict(batch))
    assert_same(grads, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_films_with_their_sound_keep_the_features_of_both(packed):
    model, processor = MODELS["qwen2_5_omni"]()
    media = [Media(videos=[dataclasses.replace(film(seed=n), audio=sound(1, seed=n))]) for n in (0, 1)]
    samples = [
        encode_sample(processor, sample_of("<video>\nWhat is said?", f"Hello{'!' * n}", videos=1), each)
        for n, each in enumerate(media)
    ]
    model = scattered(get_peft_model(model, TRAINS["both"])).train()
    plan = plan_features(model, TRAINS["both"])
    collate = (PackedCollator if packed else MultimodalCollator)(processor)
    hits = [{**kept(row, plan, model), "features_key": str(n)} for n, row in enumerate(samples)]
    with tree_attention_on(model):
        expected = gradients(model, with_positions(model, collate(samples)))
        batch = with_positions(model, collate(hits))
        assert batch["use_audio_in_video"] is True
        _, grads = fed_gradients(model, plan, dict(batch))
    assert_same(grads, expected)
