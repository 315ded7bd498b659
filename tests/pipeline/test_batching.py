"""Whole runs with steps cut by a budget of tokens: the losses of plain micro-batches, on one process and on two."""

import json

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from mmpeft import Recipe
from mmpeft.core.errors import DataError, RunInterrupted
from mmpeft.core.files import read_json
from mmpeft.data.batching import GlobalBatchSampler
from mmpeft.training.callbacks import read_metrics
from mmpeft.training.trainer import MultimodalTrainer
from tests.families.qwen import tiny_qwen2_5_vl
from tests.processes import accelerate, run_recipe
from tests.project import TWO_STAGES, StopAfter, write_project

STAGES = [{**TWO_STAGES[1], "max_steps": None, "epochs": 2}]


def write(folder, *, base=None, stages=STAGES, **batch):
    """A project of 22 samples: short and long answers, some questions on one picture, some without any."""
    changes = {"stages": stages, "batch": {"size": 8, **batch}}
    path = write_project(folder, **({**changes, "model": str(base)} if base else changes))
    file = folder / "data" / "train.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] = "yes " * (1 + 7 * (number % 5))
        row["image"] = f"train-{number // 6}.png"
        if number % 4 == 3:
            del row["image"]
            row["conversations"][0]["value"] = "no picture?"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run(path, *overrides):
    result = mmpeft.run(Recipe.from_yaml(path, overrides))
    stage = result.output / "stages" / "01-language"
    return [row["loss"] for row in read_metrics(stage / "metrics.jsonl")], read_json(stage / "stage.json")["figures"]


def speedup(figures, name):
    return next(one for one in figures["speedups"] if one["name"] == name)


@pytest.mark.parametrize(
    ("family", "packing"),
    [
        ("llava", True),
        ("llava", False),
        pytest.param("qwen2_5_vl", True, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", False, marks=pytest.mark.slow),
    ],
)
def test_a_budget_of_tokens_follows_the_losses_of_plain_micro_batches(tmp_path, packing, family):
    base = None
    if family == "qwen2_5_vl":
        base = tmp_path / "qwen"
        model, processor = tiny_qwen2_5_vl()
        model.save_pretrained(base)
        processor.save_pretrained(base)
    plain, before = run(write(tmp_path / "plain", base=base, micro=2, packing=packing))
    budget, after = run(write(tmp_path / "budget", base=base, tokens=400, packing=packing))
    assert len(plain) == 6
    assert budget == pytest.approx(plain, rel=1e-5)
    assert before["samples"] == after["samples"] == 44
    assert before["tokens"] == after["tokens"]
    tokens = speedup(after, "batch.tokens")
    assert tokens["on"]
    assert tokens["saved"]["tokens_in_the_largest"] >= 0
    largest = int(tokens["why"].split("the largest of all holds ")[1].split(" ")[0])
    assert 100 < largest <= 400
    assert not speedup(before, "batch.tokens")["on"]


def test_padding_is_spared_where_samples_cannot_be_packed(tmp_path):
    _, before = run(write(tmp_path / "a", micro=4, packing=False, balance=False))
    _, after = run(write(tmp_path / "b", micro=4, packing=False))
    balance = speedup(after, "batch.balance")
    assert balance["on"]
    assert before["tokens"] == after["tokens"]
    assert after["tokens_computed"] < 0.8 * before["tokens_computed"]
    assert not speedup(before, "batch.balance")["on"]
    assert balance["saved"]["padding_tokens"] > 0


def test_samples_longer_than_the_budget_are_named_before_anything_is_trained(tmp_path):
    path = write(tmp_path, tokens=100)
    with pytest.raises(DataError) as caught:
        run(path)
    text = str(caught.value)
    assert "of 22 samples of" in text
    assert "train.json:1: sample 4 (id 'train-4'): 1" in text
    assert "raise batch.tokens to 1" in text
    assert "data.max_length: 100" in text
    assert not (tmp_path / "run" / "stages").exists()
    losses, _ = run(path, "data.max_length=100")
    assert len(losses) == 6


@pytest.mark.parametrize(
    ("step", "then"),
    [
        (2, "batch.tokens=300"),
        pytest.param(2, "batch.tokens=400", marks=pytest.mark.slow),
        pytest.param(5, "batch.tokens=300", marks=pytest.mark.slow),
        pytest.param(5, "batch.tokens=400", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_the_middle_of_an_epoch_also_under_another_budget(tmp_path, monkeypatch, step, then):
    stages = [{**STAGES[0], "trainer": {"save_steps": 1}}]
    want, _ = run(write(tmp_path / "whole", stages=stages, tokens=400))
    path = write(tmp_path / "broken", stages=stages, tokens=400)
    with monkeypatch.context() as patch:
        begin = MultimodalTrainer.__init__

        def interrupted(self, *args, **kwargs):
            begin(self, *args, **kwargs)
            self.add_callback(StopAfter(step))

        patch.setattr(MultimodalTrainer, "__init__", interrupted)
        with pytest.raises((KeyboardInterrupt, RunInterrupted)):
            run(path)
    got, _ = run(path, then)
    state = read_json(tmp_path / "broken" / "run" / "stages" / "01-language" / "stage.json")
    assert state["resumed_from"] == step - 1
    assert got == pytest.approx(want, rel=1e-5)
    weights = [
        load_file(tmp_path / name / "run" / "adapter" / "adapter_model.safetensors") for name in ("whole", "broken")
    ]
    for name, tensor in weights[0].items():
        assert torch.allclose(weights[1][name], tensor, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batch", [{"tokens": 400}, {"tokens": 400, "packing": False}, {"micro": 2}, {"tokens": 600, "balance": False}]
)
def test_two_processes_have_the_losses_of_one(tmp_path, batch):
    one, two = tmp_path / "one", tmp_path / "two"
    want, _ = run(write(one, **batch))
    done = run_recipe(write(two, **batch), launcher=accelerate("cpu_ddp"), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_json(two / "run" / "run.json")["processes"] == 2
    rows = read_metrics(two / "run" / "stages" / "01-language" / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(want, rel=1e-5)


def test_switched_off_it_takes_the_batches_of_before(tmp_path, monkeypatch):
    made = []
    begin = GlobalBatchSampler.__init__

    def noted(self, **options):
        begin(self, **options)
        made.append(self)

    monkeypatch.setattr(GlobalBatchSampler, "__init__", noted)
    run(write(tmp_path, micro=4, balance=False))
    assert made
