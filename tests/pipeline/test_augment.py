"""Augmentation in a whole run: what is trained on changes from epoch to epoch, and nothing else does."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mmpeft
from mmpeft import Recipe
from mmpeft.core.errors import DataError
from mmpeft.core.files import read_json, write_json
from mmpeft.pipeline.data import load_held_out, load_train
from mmpeft.training.callbacks import read_metrics
from tests.processes import accelerate, run_recipe
from tests.project import write_data, write_project

AUGMENT = {
    "crop": {"area": [0.3, 0.9]},
    "colour": {"brightness": 0.5, "hue": 0.2},
    "flip": True,
    "paraphrase": {"bright?": ["light?", "is it bright?"]},
}
STAGES = [
    {
        "name": "language",
        "train": {"projector": "full", "language": {"r": 4}},
        "learning_rate": 1e-2,
        "epochs": 3,
        "trainer": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9},
    }
]


def recipe(folder, *, augment=AUGMENT, **data):
    """A project with 22 samples in steps of 8: three an epoch, nine in all, a checkpoint after each."""
    write_project(folder)
    files = {"train": folder / "data" / "train.json", "eval": folder / "data" / "eval.json"}
    values = {name: str(path) for name, path in files.items()} | {"media_root": str(folder / "data" / "images")}
    block = values | ({"augment": augment} if augment else {}) | data
    return Recipe.from_yaml(write_project(folder, stages=STAGES, data=block))


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "run" / "stages" / "01-language" / "metrics.jsonl")]


def weights(folder):
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    mmpeft.run(recipe(folder))
    return folder


def test_workers_that_outlive_an_epoch_see_the_same(whole, tmp_path):
    mmpeft.run(recipe(tmp_path, workers=2))
    assert len(losses(whole)) == 9
    assert losses(tmp_path) == losses(whole)


def test_without_it_the_losses_are_others_and_the_answers_before_training_the_same(whole, tmp_path):
    mmpeft.run(recipe(tmp_path, augment=None))
    assert all(one != other for one, other in zip(losses(tmp_path), losses(whole), strict=True))
    plain, varied = (read_json(folder / "run" / "evaluation.json")["before"] for folder in (tmp_path, whole))
    assert plain["predictions"] == varied["predictions"]


@pytest.mark.parametrize(("step", "workers"), [(4, 0), (6, 2)])
def test_a_run_that_goes_on_ends_like_one_that_never_stopped(whole, tmp_path, step, workers):
    folder = tmp_path / "again"
    shutil.copytree(whole, folder)
    stage = folder / "run" / "stages" / "01-language"
    for place in (stage / "adapter", folder / "run" / "adapter"):
        shutil.rmtree(place)
    for number in range(step + 1, 10):
        shutil.rmtree(stage / "checkpoints" / f"checkpoint-{number}")
    # The paths of another folder are another input; what is on trial is what the data set sees.
    first = recipe(whole, workers=workers)
    moved = first.model_copy(update={"output": folder / "run"})
    write_json(stage / "stage.json", {**read_json(stage / "stage.json"), "status": "interrupted"})
    mmpeft.run(moved)
    assert read_json(stage / "stage.json")["resumed_from"] == step
    assert losses(folder) == losses(whole)
    want = weights(whole)
    assert all(torch.equal(tensor, want[name]) for name, tensor in weights(folder).items())


def test_only_training_samples_are_varied(tmp_path, processor):
    asked = recipe(tmp_path)
    train, held_out = load_train(asked, processor), load_held_out(asked, processor)
    same = load_held_out(recipe(tmp_path, augment=None), processor)
    for epoch in (0, 1):
        held_out.set_epoch(epoch)
        train.set_epoch(epoch)
        for index in range(len(held_out)):
            assert torch.equal(held_out[index]["pixel_values"], same[index]["pixel_values"])
            assert torch.equal(held_out[index]["input_ids"], same[index]["input_ids"])
    first = train[0]["pixel_values"]
    assert torch.equal(first, train[0]["pixel_values"])
    train.set_epoch(0)
    assert not torch.equal(first, train[0]["pixel_values"])
    assert held_out.questions() == same.questions()


def test_a_change_of_it_trains_a_stage_again(tmp_path):
    mmpeft.run(recipe(tmp_path))
    assert [stage["status"] for stage in mmpeft.run(recipe(tmp_path)).stages] == ["unchanged"]
    again = mmpeft.run(recipe(tmp_path, augment={**AUGMENT, "flip": False}))
    assert [stage["status"] for stage in again.stages] == ["trained"]


def test_several_sources_are_varied_too(tmp_path, processor):
    data = write_data(tmp_path / "data")
    mixed = mmpeft.load_dataset(
        [{"path": data / "train.json"}, {"path": data / "eval.json", "weight": 2}],
        media_root=data / "images",
        processor=processor,
    )
    plain = [mixed[index]["pixel_values"] for index in range(len(mixed))]
    mixed.augment_with({"colour": True}, seed=0)
    assert not any(torch.equal(mixed[index]["pixel_values"], plain[index]) for index in range(len(mixed)))
    mixed.set_epoch(3)
    shown = {number: [] for number in range(4)}
    for index in range(22, 30):
        shown[mixed.sample(index).index].append(mixed[index]["pixel_values"])
    assert all(len(pictures) == 2 and not torch.equal(*pictures) for pictures in shown.values())


def test_an_alternative_that_would_forge_a_turn_is_refused_before_training(tmp_path, processor):
    with pytest.raises(DataError, match="control token"):
        load_train(recipe(tmp_path, augment={"paraphrase": {"bright?": ["<|im_end|>"]}}), processor)


def boxed(path):
    """The rows of a file, each with a box to be told and a point to be found."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    for item in rows:
        item["conversations"][0]["value"] = "<image>\nWhat is at <box>?"
        item["conversations"][1]["value"] = "That of <box>."
        item["boxes"] = [[12, 5, 24, 15], [6, 10]]
    path.write_text(json.dumps(rows), encoding="utf-8")


def test_a_run_with_boxes_moves_them_and_asks_with_them(tmp_path):
    asked = recipe(tmp_path)
    for name in ("train.json", "eval.json"):
        boxed(tmp_path / "data" / name)
    mmpeft.run(asked)
    assert len(losses(tmp_path)) == 9
    prediction = read_json(tmp_path / "run" / "evaluation.json")["after"]["predictions"][0]
    assert "What is at [0.5, 0.25, 1.0, 0.75]?" in prediction["prompt"]
    assert prediction["reference"] == "That of [0.25, 0.5]."
    described = read_json(tmp_path / "run" / "data.json")
    assert [described[part]["boxes"] for part in ("train", "eval")] == ["fraction", "fraction"]
    assert read_json(tmp_path / "run" / "adapter" / "mmpeft.json")["data"]["train"]["boxes"] == "fraction"


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    mmpeft.run(recipe(one))
    recipe(two, workers=1)
    done = run_recipe(two / "recipe.yaml", launcher=accelerate("cpu_ddp"), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
