"""Nothing that makes training faster changes it: loss and gradients of a run's step against plain transformers.

A recipe runs on random samples, and what its step gives is held against each sample in a forward of its own, padded by
nothing and packed with nothing, weighted by its labelled tokens. So what is tested is what a user's run does, with each
feature alone and with all of them.
"""

import json
import tempfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, TrainerCallback

import mmpeft
from mmpeft import Recipe
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.base import base_of
from mmpeft.models.load import auto_class, load_processor
from mmpeft.training.callbacks import read_metrics
from tests.families.models import FIRST_CLASS, SINGLE_TURN
from tests.families.samples import SIZES, picture
from tests.training.test_recompute import failing_unless_recomputed

BOTH = {"projector": "full", "language": {"r": 4, "lora_alpha": 8}}
LORA = {"language": {"r": 4, "lora_alpha": 8}}
PACKABLE = {name: family_of(make()[0]).packable for name, make in FIRST_CLASS.items()}

OFF = {
    "batch": {"packing": False, "share_media": False, "balance": False},
    "compute": {
        "supervised_only": False,
        "chunked_loss": False,
        "fuse_lora": False,
        "spare_cache": False,
        "spare_mask": False,
        "linear_patches": False,
        "checkpointing": False,
        # Of half precision, accelerators or long runs; off, so that none of them is on in "nothing".
        "compile": False,
        "liger": False,
        "spare_casts": False,
        "block_attention": False,
        "npu_kernels": False,
        "copy_ahead": False,
    },
    "cache": {"features": False, "tokens": False},
    "data": {"workers": 0},
}
BUDGET = "half as much again as the longest sample"
FEATURES = {
    "nothing": {},
    "supervised": {"compute": {"supervised_only": True}},
    "chunked": {"compute": {"supervised_only": True, "chunked_loss": True}},
    "packing": {"batch": {"packing": True}},
    "shared": {"batch": {"packing": True, "share_media": True}},
    "tokens": {"batch": {"tokens": BUDGET, "balance": True}},
    "features": {"cache": {"features": True}},
    "texts": {"cache": {"tokens": True}},
    "workers": {"data": {"workers": 1}},
    "fuse_lora": {"compute": {"fuse_lora": True}},
    "spare_cache": {"compute": {"spare_cache": True}},
    "spare_mask": {"compute": {"spare_mask": True}},
    "linear_patches": {"compute": {"linear_patches": True}},
    "checkpointing": {"compute": {"checkpointing": True}},
    "again": {
        "batch": {"packing": True, "share_media": True},
        "compute": {"supervised_only": True, "chunked_loss": True, "fuse_lora": True, "checkpointing": "auto"},
        "cache": {"features": True},
    },
    "all": {
        "batch": {"packing": True, "share_media": True, "tokens": BUDGET, "balance": True},
        "compute": {
            "supervised_only": True,
            "chunked_loss": True,
            "fuse_lora": True,
            "spare_cache": True,
            "spare_mask": True,
            "linear_patches": True,
            "checkpointing": "auto",
        },
        "cache": {"features": True, "tokens": True},
        "data": {"workers": "auto"},
    },
}
REPORTED = {
    "supervised": "compute.supervised_only",
    "chunked": "compute.chunked_loss",
    "packing": "batch.packing",
    "shared": "batch.share_media",
    "tokens": "batch.tokens",
    "features": "data.cache.features",
    "texts": "data.cache.tokens",
    "workers": "data.workers",
    "fuse_lora": "compute.fuse_lora",
    "spare_cache": "compute.spare_cache",
    "spare_mask": "compute.spare_mask",
    "linear_patches": "compute.linear_patches",
    "checkpointing": "compute.checkpointing",
    "again": "compute.checkpointing",
}
"""What a stage's record calls them."""
PACKED = {name for name, blocks in FEATURES.items() if blocks.get("batch", {}).get("packing")}
CASES = [(family, feature) for family in FIRST_CLASS for feature in FEATURES if PACKABLE[family] or feature != "shared"]

RTOL = 1e-5
"""Of a loss, and of a gradient's norm."""


def blocks_of(family, feature, longest):
    """The recipe's blocks with a feature on and all others off; `longest` in tokens."""
    changed = {name: {**off, **FEATURES[feature].get(name, {})} for name, off in OFF.items()}
    if "tokens" in changed["batch"]:
        changed["batch"]["tokens"] = longest + longest // 2
    if not PACKABLE[family]:
        changed["batch"] |= {"packing": False, "share_media": False}
    return changed


@st.composite
def sample_lists(draw, family):
    """Samples as (media, answers): numbers of pictures or recordings in the pool, and the words of each answer."""
    single = family in SINGLE_TURN
    media = st.lists(st.integers(0, 2), min_size=int(single), max_size=1 if single else 2, unique=True)
    answers = st.lists(st.integers(1, 9), min_size=1, max_size=1 if single else 2)
    return draw(st.lists(st.tuples(media, answers, st.integers(0, 3)), min_size=2, max_size=6))


def write(folder, family, samples):
    """The samples as a data file, with what they show."""
    sound = family == "qwen2_audio"
    suffix, key = (".wav", "audio") if sound else (".png", "image")
    for number in range(3):
        if sound:
            noise = np.random.default_rng(number).integers(-9000, 9000, 4_000 + 1_600 * number, dtype=np.int16)
            with wave.open(str(folder / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, 16_000, 0, "NONE", ""))
                file.writeframes(noise.tobytes())
        else:
            shown: Image.Image = picture(SIZES[number], number)
            shown.save(folder / f"{number}.png")
    rows = []
    for index, (media, answers, words) in enumerate(samples):
        turns = []
        for number, length in enumerate(answers):
            marks = f"<{key}>\n" * len(media) if not number else ""
            turns.append({"from": "human", "value": f"{marks}What is it{', then' * words}?"})
            turns.append({"from": "gpt", "value": " ".join(f"a{index}" for _ in range(length))})
        files = {key: [f"{number}{suffix}" for number in media]} if media else {}
        rows.append({"id": str(index), **files, "conversations": turns})
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")


def write_recipe(folder, base, blocks, *, train=BOTH, size, **stage):
    return Recipe.from_dict(
        {
            "model": str(base),
            "data": {
                "train": str(folder / "train.json"),
                "cache": {**blocks["cache"], "directory": str(folder / "cache")},
                **blocks["data"],
            },
            "stages": [
                {
                    "name": "stage",
                    "train": train,
                    "learning_rate": 1e-30,
                    "trainer": {
                        "train_sampling_strategy": "sequential",
                        "lr_scheduler_type": "constant",
                        "warmup_steps": 0,
                        "weight_decay": 0.0,
                        "max_grad_norm": 0.0,
                        "logging_steps": 1,
                        "save_strategy": "no",
                    },
                    **stage,
                }
            ],
            "batch": {"size": size, **blocks["batch"]},
            "compute": blocks["compute"],
            "output": str(folder / "run"),
            "device": "cpu",
        }
    )


class Spy(TrainerCallback):
    """Scatters what trains, for a fresh LoRA has no gradient in one half; keeps loss and gradients of each step.

    With `fails`, memory does not suffice for a micro-batch until the language model's first layer is recomputed.
    """

    def __init__(self, *, fails=False):
        self.start, self.steps, self.losses, self.fails = {}, [], [], fails

    def on_train_begin(self, args, state, control, model=None, **_):
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
                    self.start[name] = parameter.detach().clone()
        if self.fails:
            failing_unless_recomputed(base_of(model).get_decoder().layers[0])

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])


def one_by_one(base, train, start, rows, dtype):
    """Loss and gradients of plain transformers, a sample a forward, on weights that are given."""
    config = AutoConfig.from_pretrained(base)
    model = get_peft_model(auto_class(config, str(base)).from_pretrained(base), train).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(start[name])
    model.to(dtype)
    labelled = [int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in rows]
    total = 0.0
    for row, count in zip(rows, labelled, strict=True):
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in row.items()}
        aligned = {"input_ids", "labels", "token_type_ids", "mm_token_type_ids"}.intersection(batch)
        batch |= {key: batch[key][None] for key in aligned}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        loss = model(**batch).loss * (count / sum(labelled))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(family, base, feature, samples, monkeypatch, train=BOTH):
    """One step on all samples at once, twice: with a feature cache that is cold, and with one that is warm.

    Returns the names of what the stage's record says was on.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, family, samples)
        dataset = mmpeft.load_dataset(folder / "train.json", processor=load_processor(str(base)))
        rows = [{key: torch.as_tensor(value) for key, value in dataset[index].items()} for index in range(len(dataset))]
        blocks = blocks_of(family, feature, max(len(row["input_ids"]) for row in rows))
        spy = Spy(fails=feature == "again")
        callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, spy]
        recipe = write_recipe(folder, base, blocks, train=train, size=len(samples), epochs=2)
        with monkeypatch.context() as patch:
            patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
            done = mmpeft.run(recipe)
    loss, expected = one_by_one(base, train, spy.start, rows, torch.float32)
    assert len(spy.steps) == len(spy.losses) == 2
    assert spy.losses == pytest.approx([loss, loss], rel=RTOL)
    exact: dict[str, torch.Tensor] = {}
    for gradients in spy.steps:
        for name, start in spy.start.items():
            found, plain = gradients.get(name), expected.get(name)
            found, plain = (torch.zeros_like(start) if gradient is None else gradient for gradient in (found, plain))
            if (found - plain).norm() > RTOL * plain.norm():
                # What float32 itself leaves of a gradient whose terms cancel is told by float64.
                exact = exact or one_by_one(base, train, spy.start, rows, torch.float64)[1]
                true = exact.get(name, torch.zeros_like(start).double())
                noise = (plain - true).norm()
                assert (found - true).norm() <= RTOL * true.norm() + 4 * noise, name
    return {speedup["name"] for speedup in done.stages[0]["figures"]["speedups"] if speedup["on"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Each family's model on disk, made once."""
    made = {}

    def base_of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            model, processor = FIRST_CLASS[family]()
            model.save_pretrained(made[family])
            processor.save_pretrained(made[family])
        return made[family]

    return base_of


FIXED = [([0], [2], 0), ([], [3], 1), ([0], [5, 1], 2), ([1, 0], [1], 0), ([0], [4], 3)]
"""Samples that share a picture, have two, or none."""


def fixed(family):
    return (
        [([media[0]], answers[:1], words) for media, answers, words in FIXED if media]
        if family in SINGLE_TURN
        else FIXED
    )


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_a_step_with_everything_on_is_that_of_plain_transformers(family, bases, monkeypatch):
    check(family, bases(family), "all", fixed(family), monkeypatch)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_step_with_each_feature_is_that_of_plain_transformers(feature, bases, monkeypatch):
    on = check("qwen2_5_vl", bases("qwen2_5_vl"), feature, fixed("qwen2_5_vl"), monkeypatch)
    wanted = {REPORTED[feature]} if feature in REPORTED else set()
    assert wanted <= on, "the feature was not on, so nothing was tested"
    if feature == "nothing":
        assert not on.intersection(REPORTED.values())


@pytest.mark.parametrize("feature", ["features", "all"])
def test_a_frozen_projector_is_that_of_plain_transformers(feature, bases, monkeypatch):
    check("llava", bases("llava"), feature, fixed("llava"), monkeypatch, train=LORA)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_batches_with_everything_on(family, bases, monkeypatch, data):
    check(family, bases(family), "all", data.draw(sample_lists(family)), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "feature"), CASES)
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_batches_with_each_feature(family, feature, bases, monkeypatch, data):
    train = data.draw(st.sampled_from([BOTH, LORA]))
    check(family, bases(family), feature, data.draw(sample_lists(family)), monkeypatch, train=train)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_fifty_steps_with_everything_on_follow_those_with_everything_off(family, bases, tmp_path):
    # Samples on a picture stand together already, eight of them, so that bringing them together changes no step.
    samples = [([index // 8 % 3], [1 + index % 5], index % 3) for index in range(40)]
    curves = {}
    for feature in ("nothing", "all"):
        folder = tmp_path / feature
        folder.mkdir()
        write(folder, family, samples)
        stage = {"learning_rate": 5e-3, "max_steps": 50}
        mmpeft.run(write_recipe(folder, bases(family), blocks_of(family, feature, 300), size=8, **stage))
        rows = read_metrics(folder / "run" / "stages" / "01-stage" / "metrics.jsonl")
        curves[feature] = [row["loss"] for row in rows if "loss" in row]
    assert len(curves["all"]) == 50
    # An epoch is five steps.
    assert sum(curves["all"][-5:]) < sum(curves["all"][:5]) - 5 * 0.1
    assert curves["all"] == pytest.approx(curves["nothing"], rel=1e-4)
