"""Whole runs with the feature cache: the losses of runs without it, across stages and runs, whatever lies on disk."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import LlavaForConditionalGeneration

import mmpeft
from mmpeft import Recipe
from mmpeft.training.trainer import MultimodalTrainer
from tests.processes import accelerate, figures, losses, run_recipe
from tests.project import TWO_STAGES, write_project

LANGUAGE_ALONE = [TWO_STAGES[0], {**TWO_STAGES[1], "train": {"language": {"r": 4}}, "learning_rate": 1e-2}]


def run(path, output, *overrides):
    """Losses by stage, and what each stage says of the cache."""
    recipe = Recipe.from_yaml(path, (f"output={path.parent / output}", *overrides))
    mmpeft.run(recipe)
    return told(path.parent / output)


def told(output):
    """The same, of a run that is over."""
    by_name = [{each["name"]: each for each in figure["speedups"]} for figure in figures(output)]
    return losses(output), [each["data.cache.features"] for each in by_name]


def misses(speedup):
    """Samples whose towers ran, out of the sentence that the report shows."""
    return int(speedup["why"].partition("towers ran for ")[2].split()[0].replace(",", ""))


def entries(folder):
    return sorted((folder / "cache" / "features").glob("*/*.safetensors"))


def project(folder, **changes):
    data = {
        "train": str(folder / "data" / "train.json"),
        "media_root": str(folder / "data" / "images"),
        "cache": {"directory": str(folder / "cache")},
    }
    path = write_project(folder, **changes)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"] = {**recipe["data"], "cache": data["cache"]}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    "stages",
    [pytest.param(TWO_STAGES, marks=pytest.mark.slow), LANGUAGE_ALONE],
    ids=["projector-both", "projector-language"],
)
def test_stages_and_runs_share_features_and_follow_the_losses_without(tmp_path, stages):
    path = project(tmp_path, stages=stages)
    plain, off = run(path, "off", "data.cache.features=false")
    assert [(each["on"], each["why"]) for each in off] == [(False, "data.cache.features is false")] * 2
    assert not entries(tmp_path)

    losses, first = run(path, "first")
    assert_same(losses, plain)
    kept = entries(tmp_path)
    assert [misses(each) for each in first] == [len(kept), 0]
    # Six steps of eight, but the last of an epoch has the six samples that are left.
    assert first[1]["saved"]["tower_runs"] == 44
    again = "the projector runs each time, for it is frozen in this stage and trained in another"
    assert [again in each["why"] for each in first] == [False, stages is LANGUAGE_ALONE]

    losses, second = run(path, "second")
    assert_same(losses, plain)
    assert [misses(each) for each in second] == [0, 0]
    assert entries(tmp_path) == kept


def test_steps_are_cut_by_the_towers_cost_only_until_they_rest(tmp_path, monkeypatch):
    trainers = []
    train = MultimodalTrainer.train

    def watched(self, *args, **kwargs):
        trainers.append(self)
        return train(self, *args, **kwargs)

    monkeypatch.setattr(MultimodalTrainer, "train", watched)
    # The first stage shows each sample once; the second finds all that it takes.
    stages = [{**TWO_STAGES[0], "max_steps": 3}, {**TWO_STAGES[1], "max_steps": 1}]
    path = project(tmp_path, stages=stages)
    run(path, "off", "data.cache.features=false")
    run(path, "first", "data.cache.features=true")
    run(path, "second", "data.cache.features=true")
    towers = [trainer.cut.costs.vision for trainer in trainers]
    assert min(towers[:2]) > 0
    assert towers[2:] == [towers[0], 0, 0, 0]


@pytest.mark.slow
def test_entries_that_are_broken_on_disk_are_made_anew(tmp_path):
    path = project(tmp_path)
    plain, _ = run(path, "first")
    kept = entries(tmp_path)
    whole = kept[0].read_bytes()
    kept[0].write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(kept[1].read_bytes())
    flipped[-3] ^= 0x40
    kept[1].write_bytes(bytes(flipped))
    kept[2].write_bytes(b"")
    shutil.copy(kept[4], kept[3])

    losses, speedups = run(path, "second")
    assert_same(losses, plain)
    assert [misses(each) for each in speedups] == [4, 0]
    losses, speedups = run(path, "third")
    assert_same(losses, plain)
    assert [misses(each) for each in speedups] == [0, 0]


@pytest.mark.slow
def test_another_towers_weights_or_another_size_of_pictures_find_nothing(tmp_path):
    path = project(tmp_path)
    run(path, "first")
    kept = len(entries(tmp_path))
    base = tmp_path / "base"
    model = LlavaForConditionalGeneration.from_pretrained(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    model.save_pretrained(base)
    _, same = run(path, "another_head")
    assert misses(same[0]) == 0
    with torch.no_grad():
        model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(1.01)
    model.save_pretrained(base)
    _, other = run(path, "another_tower")
    assert [misses(each) for each in other] == [kept, 0]
    settings = json.loads((base / "processor_config.json").read_text(encoding="utf-8"))
    settings["image_processor"]["image_mean"] = [0.4, 0.4, 0.4]
    (base / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    _, other = run(path, "another_processor")
    assert [misses(each) for each in other] == [kept, 0]


@pytest.mark.slow
def test_a_stage_that_cannot_keep_features_reads_pictures_again(tmp_path):
    tower = {"name": "tower", "train": {"vision": {"r": 2}, "projector": "full"}, "learning_rate": 1e-3, "max_steps": 2}
    path = project(tmp_path, stages=[TWO_STAGES[0], tower])
    plain, _ = run(path, "off", "data.cache.features=false")
    losses, speedups = run(path, "on")
    assert_same(losses, plain)
    assert [each["on"] for each in speedups] == [True, False]
    assert speedups[1]["why"] == "the vision tower trains, so its outputs change from step to step"


@pytest.mark.parametrize(
    ("override", "why"),
    [
        (("data.augment.flip=true",), "data.augment varies pictures from epoch to epoch"),
        (("stages.0.max_steps=1", "stages.1.max_steps=1"), "no medium is shown twice"),
    ],
)
def test_the_report_says_why_nothing_is_kept(tmp_path, override, why):
    path = project(tmp_path)
    _, speedups = run(path, "run", *override)
    assert all(not each["on"] and each["why"].startswith(why) and not each["saved"] for each in speedups)
    assert not entries(tmp_path)


@pytest.mark.slow
def test_two_processes_keep_what_one_process_finds(tmp_path):
    path = project(tmp_path)
    plain, _ = run(path, "off", "data.cache.features=false")
    done = run_recipe(path, f"output={tmp_path / 'two'}", launcher=accelerate("cpu_ddp"), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    losses, speedups = told(tmp_path / "two")
    assert_same(losses, plain)
    # A picture that comes to both before either has written it runs in both.
    assert len(entries(tmp_path)) <= misses(speedups[0]) <= 2 * len(entries(tmp_path))
    assert misses(speedups[1]) == 0
    losses, speedups = run(path, "one")
    assert_same(losses, plain)
    assert [misses(each) for each in speedups] == [0, 0]


@pytest.mark.slow
def test_workers_that_read_ahead_follow_the_same_losses_and_no_tower_runs_twice(tmp_path):
    path = project(tmp_path)
    plain, _ = run(path, "off", "data.cache.features=false")
    losses, speedups = run(path, "on", "data.workers=2")
    assert_same(losses, plain)
    assert [misses(each) for each in speedups] == [len(entries(tmp_path)), 0]
