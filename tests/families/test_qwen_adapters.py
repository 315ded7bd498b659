"""Adapters on each family of the Qwen line, on tiny real models fed by their real processors."""

import inspect

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.methods.plan import base_name, describe_training
from tests.families.qwen import AUDIO_SECONDS, QWEN, SAMPLING_RATE, TOKEN_SIDE

PROJECTOR = {"projector": "full"}
LORA = {"language": {"r": 4, "lora_alpha": 8}}
TRAINS = [PROJECTOR, LORA, {**PROJECTOR, **LORA}]

families = pytest.mark.parametrize("family", QWEN)


def media_of(processor, modality):
    """Arguments by which a processor takes one picture of odd size, two frames of video or a second of sound."""
    noise = np.random.default_rng(0)
    if modality == "image":
        return {"images": [Image.fromarray(noise.integers(0, 255, (13, 29, 3), dtype=np.uint8))]}
    if modality == "audio":
        samples = noise.standard_normal(AUDIO_SECONDS * SAMPLING_RATE).astype(np.float32) / 10
        return {"audio": [samples], "audio_kwargs": {"sampling_rate": SAMPLING_RATE}}
    frames = noise.integers(0, 255, (2, 16, 24, 3), dtype=np.uint8)
    # The omni processor's own default size would win over its video processor's.
    size = dict(processor.video_processor.size)
    metadata = [{"total_num_frames": 2, "fps": 2.0, "frames_indices": [0, 1]}]
    return {
        "videos": [frames],
        "videos_kwargs": {"do_sample_frames": False, "video_metadata": metadata, "size": size},
    }


def batch_of(processor, modalities, *, answer="It is red."):
    """One row with every modality in it; all but the answer's tokens are masked out of the labels."""
    content = [{"type": modality} for modality in modalities] + [{"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    arguments = {key: value for modality in modalities for key, value in media_of(processor, modality).items()}
    batch = dict(processor(text=[prompt + answer], return_tensors="pt", **arguments))
    labels = batch["input_ids"].clone()
    labels[:, : -len(answer.encode())] = -100
    return {**batch, "labels": labels}


def built(family):
    model, processor = QWEN[family]()
    return model, batch_of(processor, family_of(model).modalities)


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
    model, _ = QWEN[family]()
    total = sum(parameter.numel() for parameter in model.parameters())
    peft_model = get_peft_model(model, {**PROJECTOR, **LORA})
    plan = describe_training(peft_model, {**PROJECTOR, **LORA}, 1e-4)
    rows = {row.part: row for row in plan.parts}
    assert plan.total == total
    assert rows["projector"].trainable == rows["projector"].parameters > 0
    assert rows["language"].state == "lora"
    assert 0 < rows["language"].trainable < rows["language"].parameters
    assert set(rows) - {"projector", "language"} <= {"vision", "audio"}
    assert all(row.trainable == 0 for part, row in rows.items() if part in ("vision", "audio"))


@families
@pytest.mark.parametrize("train", TRAINS, ids=["projector", "lora", "both"])
def test_a_fresh_adapter_changes_no_logit_and_training_lowers_the_loss(family, train):
    model, batch = built(family)
    with torch.no_grad():
        before = model(**batch)
    peft_model = get_peft_model(model, train)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(**batch).logits, before.logits, rtol=0, atol=0)
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
        before = QWEN[family]()[0](**batch).logits
        expected = peft_model(**batch).logits
    assert (expected - before).abs().max() > 1e-3
    save_adapter(peft_model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(QWEN[family]()[0], tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=0)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-5)


@families
def test_it_generates_the_same_with_and_without_a_cache(family):
    model, batch = built(family)
    peft_model = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).eval()
    prompt = {name: tensor for name, tensor in batch.items() if name != "labels"}
    length = prompt["input_ids"].shape[1]
    # A model of random weights would write a picture's token, for which there is no feature.
    special = [token for token in range(256, model.get_input_embeddings().num_embeddings)]
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": special}
    with_cache = peft_model.generate(**prompt, **options)
    without = peft_model.generate(**prompt, **options, use_cache=False)
    assert with_cache.shape[1] == length + 6
    assert with_cache.tolist() == without.tolist()


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


@families
def test_a_padded_batch_gives_each_sample_the_logits_it_has_alone(family):
    model, processor = QWEN[family]()
    modalities = family_of(model).modalities[:1]
    singles = [batch_of(processor, modalities, answer=answer) for answer in ("It is red.", "Blue, and some green too.")]
    fill = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100}
    longest = max(single["input_ids"].shape[1] for single in singles)
    batch = {}
    for name, tensor in singles[0].items():
        tensors = [single[name] for single in singles]
        if tensor.shape[1:] == singles[0]["input_ids"].shape[1:]:
            tensors = [torch.nn.functional.pad(t, (0, longest - t.shape[1]), value=fill.get(name, 0)) for t in tensors]
        batch[name] = torch.cat(tensors)
    with torch.no_grad():
        logits = model(**batch).logits
        for row, single in enumerate(singles):
            length = single["input_ids"].shape[1]
            torch.testing.assert_close(logits[row, :length], model(**single).logits[0], rtol=1e-5, atol=1e-5)


@families
def test_the_loss_of_the_supervised_positions_alone_is_the_loss(family):
    model, batch = built(family)
    supervised = (batch["labels"][0] != -100).nonzero().flatten()
    with torch.no_grad():
        whole = model(**batch)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if not family_of(model).supervised_logits:
            assert "logits_to_keep" not in inspect.signature(type(model).forward).parameters
            assert model(**inputs, logits_to_keep=supervised - 1).logits.shape == whole.logits.shape
            return
        targets = batch["labels"][:, supervised]
        kept = model(**inputs, labels=targets, shift_labels=targets, logits_to_keep=supervised - 1)
        torch.testing.assert_close(kept.logits, whole.logits[:, supervised - 1])
    torch.testing.assert_close(kept.loss, whole.loss)


@families
@pytest.mark.parametrize("size", [(13, 29), (40, 200), (61, 5), (1, 1)])
def test_picture_tokens_match_features_at_odd_sizes_and_obey_the_limit(family, size):
    model, processor = QWEN[family]()
    if "image" not in family_of(model).modalities:
        assert not hasattr(processor, "image_processor")
        return
    most = processor.image_processor.size["longest_edge"]
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    batch = processor(text=[text], images=[Image.fromarray(noise)], return_tensors="pt")
    tokens = (batch["input_ids"] == processor.image_token_id).sum()
    assert 1 <= tokens <= most // TOKEN_SIDE**2
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
        assert sum(len(picture) for picture in features) == tokens
        assert model(**batch).logits.isfinite().all()
