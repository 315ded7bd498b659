"""Adapters on each first-class family, on tiny real models fed by their real processors."""

import pytest
import torch
from peft import PeftModel

from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_prompt, encode_sample
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.methods.plan import base_name, describe_training
from tests.families.models import MODELS
from tests.families.samples import every_medium, first_medium
from tests.families.tiled import tiny_gemma3

PROJECTOR = {"projector": "full"}
LORA = {"language": {"r": 4, "lora_alpha": 8}}
ROUNDING = 1e-6
"""Matrix products may round by where in memory their numbers stand: of logits about 1, on some processors."""

BARE = {"llava_next": "model.image_newline", "llava_onevision": "model.image_newline"}
"""A parameter of the projector's part that no module holds alone, so that it stays frozen."""

families = pytest.mark.parametrize("family", MODELS)


def built(family):
    """The model, and one batch that holds every modality it takes."""
    model, processor = MODELS[family]()
    rows = [encode_sample(processor, *made) for made in every_medium(model, processor)]
    return model, MultimodalCollator(processor, supervised_only=False)(rows)


def scattered(model):
    """Random weights wherever something trains: a fresh LoRA is zero, so many faults would not show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@families
def test_every_parameter_has_a_part_and_the_plan_counts_all_of_them(family):
    model, _ = MODELS[family]()
    total = sum(parameter.numel() for parameter in model.parameters())
    peft_model = get_peft_model(model, {**PROJECTOR, **LORA})
    plan = describe_training(peft_model, {**PROJECTOR, **LORA}, 1e-4)
    rows = {row.part: row for row in plan.parts}
    assert plan.total == total
    frozen = dict(model.named_parameters())[BARE[family]].numel() if family in BARE else 0
    assert rows["projector"].trainable == rows["projector"].parameters - frozen > 0
    assert rows["language"].state == "lora"
    assert 0 < rows["language"].trainable < rows["language"].parameters
    assert set(rows) - {"projector", "language"} <= {"vision", "audio"}
    assert all(row.trainable == 0 for part, row in rows.items() if part in ("vision", "audio"))


@families
@pytest.mark.parametrize(
    "train",
    [
        pytest.param(PROJECTOR, id="projector", marks=pytest.mark.slow),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
        pytest.param({**PROJECTOR, **LORA}, id="both"),
    ],
)
def test_a_fresh_adapter_changes_no_logit_and_training_lowers_the_loss(family, train):
    model, batch = built(family)
    with torch.no_grad():
        before = model(**batch)
    peft_model = get_peft_model(model, train)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(**batch).logits, before.logits, rtol=0, atol=ROUNDING)
    spec = family_of(peft_model)
    trained = [(name, p) for name, p in peft_model.named_parameters() if p.requires_grad]
    assert {spec.part_of(base_name(name)) for name, _ in trained} == set(train)
    frozen = {name: p.clone() for name, p in peft_model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=5e-3)
    for _ in range(3):
        optimizer.zero_grad()
        peft_model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert peft_model(**batch).loss < before.loss - 1e-4
    for name, parameter in peft_model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0)


@families
def test_every_trainable_tensor_gets_a_gradient(family):
    model, batch = built(family)
    peft_model = scattered(get_peft_model(model, {**PROJECTOR, **LORA}))
    found = gradients(peft_model, batch)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            assert found[name].abs().max() > 0, name


@families
def test_plain_peft_loads_it_exactly_and_merging_gives_the_same(family, tmp_path):
    model, batch = built(family)
    peft_model = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).eval()
    with torch.no_grad():
        before = MODELS[family]()[0](**batch).logits
        expected = peft_model(**batch).logits
    assert (expected - before).abs().max() > 1e-3
    save_adapter(peft_model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(MODELS[family]()[0], tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=ROUNDING)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)


@families
def test_it_generates_the_same_with_and_without_a_cache(family):
    model, processor = MODELS[family]()
    peft_model = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).eval()
    sample, media = first_medium(model)
    collated = MultimodalCollator(processor, supervised_only=False)([with_labels(processor, sample, media)])
    prompt = {name: tensor for name, tensor in collated.items() if name != "labels"}
    length = prompt["input_ids"].shape[1]
    # A model of random weights would write a picture's token, for which there is no feature.
    special = list(range(256, model.get_input_embeddings().num_embeddings))
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": special}
    with_cache = peft_model.generate(**prompt, **options)
    without = peft_model.generate(**prompt, **options, use_cache=False)
    assert with_cache.shape[1] == length + 6
    assert with_cache.tolist() == without.tolist()


def with_labels(processor, sample, media):
    """A prompt as the collator takes it."""
    row = encode_prompt(processor, sample.turns[:1], media)
    return {**row, "labels": torch.full_like(row["input_ids"], -100)}


@families
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model, batch = built(family)
    peft_model = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).train()
    expected = gradients(peft_model, batch)
    peft_model.activation_checkpointing_enable({"use_reentrant": False})
    peft_model.enable_input_require_grads()
    found = gradients(peft_model, batch)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@families
@pytest.mark.parametrize("tower", ["vision", "audio"])
def test_lora_on_a_tower_trains_that_tower_only(family, tower):
    model, batch = built(family)
    if tower not in family_of(model).parts:
        with pytest.raises(Exception, match=f"train.{tower}"):
            get_peft_model(model, {tower: {"r": 4}})
        return
    peft_model = scattered(get_peft_model(model, {tower: {"r": 4}}))
    spec = family_of(peft_model)
    found = gradients(peft_model, batch)
    assert {spec.part_of(base_name(name)) for name in found} == {tower}
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_an_audio_tower_may_train_in_full_as_a_vision_tower_may():
    model, batch = built("qwen2_audio")
    trained = get_peft_model(model, {"audio": "full"})
    assert trained is model
    assert {family_of(model).part_of(name) for name in gradients(model, batch)} == {"audio"}


def test_a_projector_with_a_bare_parameter_is_saved_whole(tmp_path):
    model, _ = tiny_gemma3()
    save_adapter(scattered(get_peft_model(model, PROJECTOR)), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_gemma3()[0], tmp_path / "adapter")
    weight = loaded.get_base_model().model.multi_modal_projector.modules_to_save["default"].mm_input_projection_weight
    assert not torch.equal(weight, tiny_gemma3()[0].model.multi_modal_projector.mm_input_projection_weight)
