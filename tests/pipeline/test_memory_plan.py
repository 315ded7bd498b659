"""A stage's memory: planned before it runs, compared when it has run, and what `batch.tokens: auto` takes from it."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

import mmpeft
from mmpeft import Recipe
from mmpeft.config.device_table import DEVICES
from mmpeft.config.distributed import DistributedConfig
from mmpeft.core.errors import RecipeError
from mmpeft.core.files import read_json
from mmpeft.pipeline import planning
from mmpeft.pipeline.memory_plan import Held, MemoryPlan, changes, compared, shared
from mmpeft.pipeline.run import plan
from tests.project import TWO_STAGES, write_project

MIB = 2**20
PLAN = MemoryPlan(
    how="rehearsed",
    weights=600 * MIB,
    gradients=40 * MIB,
    optimizer=80 * MIB,
    batch=2 * MIB,
    activations=400 * MIB,
    logits=100 * MIB,
    fragmentation=50 * MIB,
    overhead=300 * MIB,
    update=720 * MIB,
    load=600 * MIB,
    samples=4,
    tokens=1000,
    flop=10**12,
)
HELD = Held(trained=40 * MIB, layers=480 * MIB, layer=20 * MIB, live=100 * MIB)


def test_the_peak_is_the_largest_of_step_update_and_load():
    assert PLAN.growth == 1272 * MIB
    assert PLAN.peak == 1572 * MIB
    assert replace(PLAN, update=2000 * MIB).growth == 2000 * MIB
    assert replace(PLAN, load=2000 * MIB).growth == 2000 * MIB
    assert PLAN.to_dict()["peak"] == PLAN.peak


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "optimizer"),
    [
        ("ddp", 600, 80, 80),
        ("zero1", 600, 40, 20),
        ("zero2", 600, 10, 20),
        ("zero3", 120 + 120 + 100, 10, 20),
        ("fsdp2", 120 + 120 + 40, 80, 80),
    ],
)
def test_processes_share_what_their_strategy_shares(strategy, weights, gradients, optimizer):
    mine = shared(PLAN, DistributedConfig(strategy=strategy), 4, HELD)
    assert (mine.weights, mine.gradients, mine.optimizer) == (weights * MIB, gradients * MIB, optimizer * MIB)
    assert mine.activations == PLAN.activations
    assert shared(PLAN, DistributedConfig(strategy=strategy), 1, HELD) == PLAN


def test_what_waits_on_the_host_is_not_on_the_device():
    mine = shared(PLAN, DistributedConfig(strategy="zero2", offload="optimizer"), 1, HELD)
    assert mine.optimizer == mine.gradients == 0
    assert mine.weights == PLAN.weights


def test_deepspeed_holds_what_trains_in_half_precision():
    both = replace(HELD, halved=40 * MIB)
    mine = shared(PLAN, DistributedConfig(strategy="zero1"), 2, both)
    assert (mine.weights, mine.gradients, mine.activations) == (580 * MIB, 20 * MIB, 380 * MIB)
    assert mine.optimizer == (80 + 40) * MIB // 2
    assert shared(PLAN, DistributedConfig(strategy="zero3"), 2, both).optimizer == 40 * MIB


def test_changes_come_by_what_they_cost_in_time_and_as_many_as_are_needed_come_first():
    checkpointed = replace(PLAN, activations=50 * MIB)
    found = changes(PLAN, PLAN.peak - 450 * MIB, checkpointed=checkpointed, towers=30 * MIB, held=HELD)
    assert [change.slower for change in found] == sorted(change.slower for change in found)
    assert [change.first for change in found[:4]] == [True, True, True, False]
    assert found[1].saves == pytest.approx(0.75 * 550 * MIB, rel=1e-3)
    assert next(change for change in found if "checkpointing" in change.what).saves == 350 * MIB
    assert not any(change.first for change in changes(PLAN, PLAN.peak, checkpointed=None, towers=0, held=HELD))


def test_the_error_is_that_of_what_came_on_top():
    found = compared(PLAN.to_dict(), peak=1300 * MIB, before=100 * MIB, exact=True)
    assert found["measured_bytes"] == 1200 * MIB
    assert found["error"] == pytest.approx(72 / 1200)


def test_every_device_says_where_its_figures_come_from():
    assert {"ascend-910b", "a100-80", "h100-80", "rtx-4090"} <= set(DEVICES)
    assert all(facts.source and facts.memory > 2**34 for facts in DEVICES.values())


def test_a_share_of_matrices_or_tokens_is_rehearsed_as_well(tmp_path):
    path = write_project(tmp_path)
    recipe = Recipe.from_yaml(path).to_dict()
    found = []
    alone = {"tensor_parallel": 2, "sequence_parallel": False}
    for distributed in ("ddp", {"tensor_parallel": 2}, alone, {"context_parallel": 2}):
        recipe["stages"][1]["distributed"] = distributed
        found.append(plan(Recipe.from_dict(recipe), processes=2)[1]["memory"])
    assert [memory["how"] for memory in found] == ["rehearsed"] * 4
    whole, tokens, matrices, context = found
    assert tokens["weights"] == matrices["weights"] < whole["weights"]
    assert tokens["activations"] < matrices["activations"]
    assert context["weights"] == whole["weights"]
    # What lies outside the layers is that of all tokens.
    assert context["activations"] < 0.8 * whole["activations"]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_would_wait_on_the_host_is_planned_where_nothing_was_launched(tmp_path, processes):
    path = write_project(tmp_path)
    recipe = Recipe.from_yaml(path).to_dict()
    found = []
    for offload in ("none", "optimizer"):
        recipe["stages"][1]["distributed"] = {"strategy": "zero2", "offload": offload}
        found.append(plan(Recipe.from_dict(recipe), processes=processes)[1]["memory"])
    whole, offloaded = found
    assert offloaded["optimizer"] == 0 < whole["optimizer"]
    assert offloaded["weights"] == whole["weights"]


def test_a_plan_needs_no_weights_and_says_memory_work_and_devices(tmp_path):
    path = write_project(tmp_path)
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    first, second = plan(Recipe.from_yaml(path), device="a100-80", processes=2, speed=1e9)
    for stage in (first, second):
        memory = stage["memory"]
        assert memory["how"] == "rehearsed"
        assert memory["fits"]
        assert memory["peak"] == memory["growth"] + DEVICES["a100-80"].overhead
        assert memory["weights"] >= 4 * sum(part["parameters"] for part in stage["parts"].values())
        assert memory["activations"] > 0
        assert set(memory["devices"]) == set(DEVICES)
        assert stage["work"]["seconds"] == pytest.approx(stage["work"]["flop"] / 1e9 / 2)
    assert second["memory"]["optimizer"] > first["memory"]["optimizer"] > 0
    assert second["memory"]["update"] > first["memory"]["update"]
    assert not (tmp_path / "run").exists()


def test_an_unknown_device_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(RecipeError, match=r"device 'a100' is not known.*a100-80"):
        plan(Recipe.from_yaml(write_project(tmp_path)), device="a100")


def test_more_at_once_takes_more_and_checkpointing_takes_less(tmp_path):
    path = write_project(tmp_path, stages=TWO_STAGES[1:])

    def found(*overrides):
        return plan(Recipe.from_yaml(path, overrides))[0]["memory"]

    small, large = found("batch.micro=1"), found("batch.micro=8")
    assert large["activations"] > 3 * small["activations"]
    assert large["tokens"] > 4 * small["tokens"]
    assert found("batch.micro=8", "compute.checkpointing=true")["activations"] < 0.8 * large["activations"]


def test_a_model_that_cannot_be_rehearsed_is_estimated_and_says_so(tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise NotImplementedError("no kernel for it")

    monkeypatch.setattr(planning, "rehearse", broken)
    with caplog.at_level(logging.WARNING, logger="mmpeft"):
        memory = plan(Recipe.from_yaml(write_project(tmp_path, stages=TWO_STAGES[1:])))[0]["memory"]
    assert memory["how"] == "estimated by formula"
    assert memory["why"] == "NotImplementedError: no kernel for it"
    assert "estimated by a formula" in caplog.text
    assert memory["activations"] > 0


def test_a_run_says_planned_and_measured_in_its_records_and_report(tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft.pipeline.run.WORTH_REHEARSING", 0.0)
    result = mmpeft.run(Recipe.from_yaml(write_project(tmp_path, stages=TWO_STAGES[1:])))
    memory = read_json(result.output / "stages" / "01-language" / "stage.json")["figures"]["memory"]
    planned = read_json(result.output / "plan.json")["stages"][0]["memory"]
    assert memory["planned_bytes"] == planned["growth"] > 0
    assert memory["measured_bytes"] > 0
    assert memory["how"] == "rehearsed"
    assert "Memory, planned and measured" in result.report.read_text(encoding="utf-8")


def test_a_short_run_is_not_kept_waiting(tmp_path):
    result = mmpeft.run(Recipe.from_yaml(write_project(tmp_path, stages=TWO_STAGES[1:])))
    assert "memory" not in read_json(result.output / "plan.json")["stages"][0]
    assert "memory" not in read_json(result.output / "stages" / "01-language" / "stage.json")["figures"]


def test_auto_takes_all_of_a_step_where_it_fits_and_says_so(tmp_path):
    path = write_project(tmp_path, stages=TWO_STAGES[1:], batch={"size": 8, "tokens": "auto"})
    row = plan(Recipe.from_yaml(path))[0]
    assert row["batch"]["tokens"] % 64 == 0
    assert row["batch"]["tokens_auto"].startswith("all samples of a step")
    result = mmpeft.run(Recipe.from_yaml(path))
    assert read_json(result.output / "plan.json")["stages"][0]["batch"] == row["batch"]
    figures = read_json(result.output / "stages" / "01-language" / "stage.json")["figures"]
    assert next(one for one in figures["speedups"] if one["name"] == "batch.tokens")["on"]


def test_auto_stays_within_the_memory_that_there_is(tmp_path, monkeypatch):
    path = write_project(tmp_path, stages=TWO_STAGES[1:], batch={"size": 16, "tokens": "auto"})
    whole = plan(Recipe.from_yaml(path))[0]
    room = round(0.6 * whole["memory"]["growth"])
    monkeypatch.setattr(planning, "available_memory", lambda _: round(room / planning.ROOM))
    row = plan(Recipe.from_yaml(path))[0]
    assert row["batch"]["tokens"] < whole["batch"]["tokens"]
    assert row["memory"]["growth"] <= room
    assert "more would take more" in row["batch"]["tokens_auto"]


def test_only_auto_is_taken_for_a_number_of_tokens(tmp_path):
    with pytest.raises(RecipeError, match=r"batch\.tokens"):
        Recipe.from_yaml(write_project(tmp_path, batch={"tokens": "most"}))


@pytest.mark.slow
def test_planned_is_near_measured_in_fresh_processes(tmp_path):
    results = tmp_path / "found.json"
    for only in ("LoRA, float32, micro 4, padded", "projector, float32, micro 4, packed, feature cache"):
        command = [sys.executable, "benchmarks/memory_plan.py", "--only", only, "--results", str(results)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert abs(json.loads(results.read_text(encoding="utf-8"))["worst_error"]) <= 0.15


def test_a_recipe_with_auto_reads_back(tmp_path):
    path = write_project(tmp_path, batch={"tokens": "auto"})
    assert yaml.safe_load(yaml.safe_dump(Recipe.from_yaml(path).to_dict()))["batch"]["tokens"] == "auto"
