"""Runs that read their samples while they train."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import mmpeft
from mmpeft import Recipe
from mmpeft.cli.main import app
from mmpeft.core.errors import DataError, RecipeError
from mmpeft.core.files import read_json
from mmpeft.training.callbacks import read_metrics
from tests.pipeline.test_run import start_and_wait_for
from tests.processes import accelerate, run_recipe
from tests.project import TWO_STAGES, write_project

STAGE = {**TWO_STAGES[1], "max_steps": 6}
DROPPING = {"projector": "full", "language": {"r": 4, "lora_dropout": 0.2}}
"""Dropout draws from the process's generator: who takes a number more from it has other weights."""


def project(folder, *, stages=(STAGE,), change=None, batch=None, **data):
    """The project with its 22 training samples in a JSON Lines file; `change` edits the rows."""
    path = write_project(folder)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    rows = json.loads((folder / "data" / "train.json").read_text(encoding="utf-8"))
    rows = change(rows) if change else rows
    lines = folder / "data" / "train.jsonl"
    lines.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    data = {**given, "train": str(lines), "streaming": True, **data}
    return write_project(folder, stages=list(stages), data=data, **({"batch": batch} if batch else {}))


def run(path, **options):
    return mmpeft.run(Recipe.from_yaml(path), **options)


def rows_of(folder):
    return read_metrics(folder / "run" / "stages" / "01-language" / "metrics.jsonl")


def losses(folder):
    return [row["loss"] for row in rows_of(folder)]


def same_weights(one, two):
    want, got = (load_file(folder / "run" / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    return want.keys() == got.keys() and all(torch.equal(got[name], tensor) for name, tensor in want.items())


def two_processes(path):
    return run_recipe(path, launcher=accelerate("cpu_ddp"))


@pytest.mark.parametrize("batch", [{"size": 8, "micro": 4}, {"size": 8, "micro": 2}])
def test_in_file_order_it_trains_as_the_indexed_road_does(tmp_path, batch):
    """Two epochs of 22 samples in steps of 8: the third step of each has six."""
    sequential = {**STAGE, "trainer": {"train_sampling_strategy": "sequential"}}
    run(project(tmp_path / "a", stages=[sequential], streaming=False, batch=batch))
    run(project(tmp_path / "b", shuffle_buffer=1, batch=batch))
    assert len(losses(tmp_path / "a")) == 6
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-6)
    # Micro-batches that the end of an epoch leaves empty are filled with blanks, which are no samples.
    assert read_json(tmp_path / "b" / "run/stages/01-language/stage.json")["figures"]["samples"] == 44


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_workers_change_nothing(tmp_path):
    one, two = project(tmp_path / "one"), project(tmp_path / "two", workers=2)
    run(one)
    done = two_processes(two)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_json(tmp_path / "two" / "run" / "run.json")["processes"] == 2
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    # Each of 22 samples was seen once an epoch.
    figures = [read_json(tmp_path / name / "run/stages/01-language/stage.json")["figures"] for name in ("one", "two")]
    assert figures[0]["samples"] == figures[1]["samples"] == 44


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_samples_that_are_left(tmp_path):
    """Twenty epochs of three steps, the last of each smaller, in an order drawn with a buffer."""
    stage = {**STAGE, "train": DROPPING, "max_steps": 60, "trainer": {"save_steps": 5}}
    whole = project(tmp_path / "a", stages=[stage], shuffle_buffer=9)
    run(whole)
    broken = project(tmp_path / "b", stages=[stage], shuffle_buffer=9)
    metrics = tmp_path / "b" / "run" / "stages" / "01-language" / "metrics.jsonl"
    process = start_and_wait_for(broken, metrics, 13)
    process.kill()
    process.communicate(timeout=60)
    result = run(broken)
    assert read_json(metrics.parent / "stage.json")["resumed_from"] >= 10
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert run(broken).stages[0]["status"] == "unchanged"
    assert result.report.exists()


def test_records_say_that_it_was_streamed(tmp_path):
    path = project(tmp_path)
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert "language: samples as they are read, 6 steps of 8" in shown.stdout
    result = run(path)
    train = read_json(tmp_path / "run" / "data.json")["train"]
    assert train["streaming"]
    assert "samples" not in train
    assert "how many there are was not counted" in result.report.read_text(encoding="utf-8")
    assert "| training | train.jsonl | not recorded |" in (result.result / "README.md").read_text(encoding="utf-8")


def spoilt(rows):
    return [*rows[:20], {"id": "bad"}, *rows[20:], {"id": "worse"}]


def test_what_cannot_be_used_is_left_out_up_to_the_bound(tmp_path):
    path = project(tmp_path, change=spoilt, on_error="skip", max_skipped=2)
    result = run(path)
    skipped = read_json(tmp_path / "run/stages/01-language/stage.json")["figures"]["skipped"]
    assert [(sample["index"], sample["line"]) for sample in skipped] == [(20, 21), (23, 24)]
    assert "2 samples were skipped as they came" in result.report.read_text(encoding="utf-8")
    path = project(tmp_path, change=spoilt, on_error="skip", max_skipped=1)
    with pytest.raises(
        DataError, match=r"2 samples cannot be used:\n  /.*train\.jsonl:21: sample 20: [^$]*max_skipped allows 1 of"
    ):
        run(path)
    # A share is one of the whole file as soon as its end has been seen.
    path = project(tmp_path, change=spoilt, on_error="skip", max_skipped=0.05)
    with pytest.raises(DataError, match=r"max_skipped allows 1 of 24"):
        run(path)
    # Also where what is left out has been seen long before.
    early = project(
        tmp_path,
        change=lambda rows: [{"id": "bad"}, {"id": "worse"}, *rows],
        on_error="skip",
        max_skipped=0.05,
        shuffle_buffer=1,
        stages=[{**STAGE, "max_steps": 3}],
    )
    with pytest.raises(DataError, match=r"max_skipped allows 1 of 24"):
        run(early)


@pytest.mark.slow
def test_what_was_left_out_before_a_kill_is_still_known_and_counted(tmp_path):
    """The bad row is the first of a file that 60 steps do not come to the end of."""
    stage = {**STAGE, "max_steps": 60, "trainer": {"save_steps": 5}}
    options = {"stages": [stage], "change": lambda rows: [{"id": "bad"}, *rows * 30], "on_error": "skip"}
    path = project(tmp_path, **options, shuffle_buffer=1, max_skipped=1)
    stage = tmp_path / "run" / "stages" / "01-language"
    process = start_and_wait_for(path, stage / "metrics.jsonl", 13)
    process.kill()
    process.communicate(timeout=60)
    run(path)
    state = read_json(stage / "stage.json")
    assert state["resumed_from"] >= 10
    assert [row["line"] for row in state["figures"]["skipped"]] == [1]


@pytest.mark.slow
def test_two_processes_agree_on_what_is_left_out(tmp_path):
    one = project(tmp_path / "one", change=spoilt, on_error="skip", max_skipped=2)
    two = project(tmp_path / "two", change=spoilt, on_error="skip", max_skipped=2)
    run(one)
    done = two_processes(two)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)
    states = [read_json(tmp_path / name / "run/stages/01-language/stage.json") for name in ("one", "two")]
    assert [[row["index"] for row in state["figures"]["skipped"]] for state in states] == [[20, 23], [20, 23]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_is_named_when_its_turn_comes(tmp_path, workers):
    def late(rows):
        return [*(rows * 5)[:100], {**rows[0], "id": "late", "image": "gone.png"}]

    path = project(tmp_path, stages=[{**STAGE, "max_steps": 14}], change=late, workers=workers)
    with pytest.raises(
        DataError, match=r"^/.*train\.jsonl:101: sample 100 \(id 'late'\): picture 'gone\.png' does not"
    ):
        run(path)


def test_a_stage_of_one_source_without_steps_is_an_error():
    base = {"model": "m", "data": {"train": "a.jsonl", "streaming": True}}
    stages = [{"name": "one", "train": {"projector": "full"}}]
    with pytest.raises(RecipeError, match=r"stages.one.max_steps: missing; data.streaming does not count the samples"):
        Recipe.from_dict({**base, "stages": stages})
    stages[0]["max_steps"] = 3
    assert Recipe.from_dict({**base, "stages": stages}).data.shuffle_buffer == 10_000
    # Of several sources the samples are counted, for a weight is relative to their number.
    base["data"]["train"] = ["a.jsonl", {"path": "b.jsonl", "weight": 2}]
    del stages[0]["max_steps"]
    assert Recipe.from_dict({**base, "stages": stages}).data.streaming


@pytest.mark.slow
def test_several_sources_stream_with_their_weights(tmp_path):
    """Epochs of 8 and 12 samples in steps of 8; what two processes see, and a killed run sees after it goes on."""

    def mixed(folder, **stage):
        path = project(folder)
        data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
        lines = (folder / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "data" / "one.jsonl").write_text("".join(lines[:16]), encoding="utf-8")
        (folder / "data" / "two.jsonl").write_text("".join(lines[16:]), encoding="utf-8")
        train = [
            {"path": str(folder / "data" / "one.jsonl"), "weight": 0.5},
            {"path": str(folder / "data" / "two.jsonl"), "weight": 2},
        ]
        return write_project(folder, stages=[{**STAGE, **stage}], data={**data, "train": train, "shuffle_buffer": 4})

    run(mixed(tmp_path / "a", max_steps=None, epochs=2))
    assert [row["step"] for row in rows_of(tmp_path / "a")] == list(range(1, 7))
    train = read_json(tmp_path / "a" / "run" / "data.json")["train"]
    assert (train["samples"], train["streaming"]) == (20, True)
    assert [(source["name"], source["samples"], source["shown"]) for source in train["sources"]] == [
        ("one", 16, 8),
        ("two", 6, 12),
    ]
    done = two_processes(mixed(tmp_path / "b", max_steps=None, epochs=2))
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)

    long = {"train": DROPPING, "max_steps": 60, "trainer": {"save_steps": 5}}
    run(mixed(tmp_path / "c", **long))
    broken = mixed(tmp_path / "d", **long)
    process = start_and_wait_for(broken, tmp_path / "d/run/stages/01-language/metrics.jsonl", 13)
    process.kill()
    process.communicate(timeout=60)
    run(broken)
    assert losses(tmp_path / "c") == losses(tmp_path / "d")
    assert same_weights(tmp_path / "c", tmp_path / "d")


@pytest.mark.slow
def test_another_order_than_the_buffers_is_an_error(tmp_path):
    path = project(tmp_path, stages=[{**STAGE, "trainer": {"train_sampling_strategy": "sequential"}}])
    with pytest.raises(RecipeError, match=r"train_sampling_strategy='sequential': a stream has no other order"):
        run(path)
