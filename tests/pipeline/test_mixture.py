"""Runs on several sources with weights."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

import mmpeft
from mmpeft import Recipe
from mmpeft.cli.main import app
from mmpeft.core.errors import DataError
from mmpeft.core.files import read_json
from mmpeft.training.callbacks import read_metrics
from tests.pipeline.test_run import start_and_wait_for
from tests.processes import accelerate, run_recipe
from tests.project import TWO_STAGES, write_project

STAGE = [{**TWO_STAGES[1], "max_steps": None, "epochs": 2}]


def project(folder, sources, **changes):
    """The project with its training file cut in two: 16 samples in `one`, 6 in `two`."""
    path = write_project(folder)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    rows = json.loads((folder / "data" / "train.json").read_text(encoding="utf-8"))
    for name, part in (("one", rows[:16]), ("two", rows[16:])):
        (folder / "data" / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
    paths = [{**source, "path": str(folder / "data" / source["path"])} for source in sources]
    return write_project(folder, **{"stages": STAGE, "data": {**data, "train": paths}, **changes})


def run(path, **options):
    return mmpeft.run(Recipe.from_yaml(path), **options)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder / "run" / "stages" / "01-language" / "metrics.jsonl")]


def weights(folder):
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


WEIGHTED = [{"path": "one.json", "weight": 0.5, "name": "pictures"}, {"path": "two.json", "weight": 2}]


def test_weights_of_one_are_the_same_as_one_file(tmp_path):
    run(write_project(tmp_path / "a", stages=STAGE))
    run(project(tmp_path / "b", [{"path": "one.json"}, {"path": "two.json"}]))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    want, got = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def test_records_and_report_name_the_sources_with_weights_and_counts(tmp_path):
    path = project(tmp_path, WEIGHTED)
    result = run(path)
    train = read_json(tmp_path / "run" / "data.json")["train"]
    assert train["samples"] == 8 + 12
    said = [(source["name"], source["weight"], source["samples"], source["shown"]) for source in train["sources"]]
    assert said == [("pictures", 0.5, 16, 8), ("two", 2.0, 6, 12)]
    assert train["sources"][0]["file"].endswith("one.json")
    facts = read_json(result.result / "mmpeft.json")
    assert facts["data"]["train"] == train
    assert facts["recipe"]["data"]["train"][1]["weight"] == 2.0
    plan = read_json(tmp_path / "run" / "plan.json")["stages"][0]
    assert (plan["samples"], plan["steps"]) == (20, 6)
    assert plan["sources"][0] == {"name": "pictures", "weight": 0.5, "samples": 16, "shown": 8}
    report = result.report.read_text(encoding="utf-8")
    assert "training, pictures, weight 0.5: 8 an epoch" in report
    card = (result.result / "README.md").read_text(encoding="utf-8")
    assert "| training, weight 2 | two.json | 6 |" in card
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert "pictures: 8 of 16 samples an epoch, weight 0.5" in shown.stdout


def test_another_weight_or_another_sample_of_any_source_trains_again(tmp_path):
    path = project(tmp_path, WEIGHTED)
    run(path)
    assert run(path).stages[0]["status"] == "unchanged"
    path = project(tmp_path, [WEIGHTED[0], {**WEIGHTED[1], "name": "renamed"}])
    assert run(path).stages[0]["status"] == "unchanged"
    path = project(tmp_path, [WEIGHTED[0], {**WEIGHTED[1], "weight": 1.5}])
    assert run(path).stages[0]["status"] == "trained"
    picture = tmp_path / "data" / "images" / "train-20.png"
    picture.write_bytes((tmp_path / "data" / "images" / "train-3.png").read_bytes())
    assert run(path).stages[0]["status"] == "trained"


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_with_the_samples_that_are_left(tmp_path):
    """Twenty epochs of three steps, each with other samples of the first source."""
    dropping = {"projector": "full", "language": {"r": 4, "lora_dropout": 0.2}}
    stages = [{**STAGE[0], "train": dropping, "max_steps": 60, "trainer": {"save_steps": 5}}]
    run(project(tmp_path / "a", WEIGHTED, stages=stages))
    broken = project(tmp_path / "b", WEIGHTED, stages=stages)
    stage = tmp_path / "b" / "run" / "stages" / "01-language"
    process = start_and_wait_for(broken, stage / "metrics.jsonl", 13)
    process.kill()
    process.communicate(timeout=60)
    run(broken)
    assert read_json(stage / "stage.json")["resumed_from"] >= 10
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    want, got = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    one, two = project(tmp_path / "one", WEIGHTED), project(tmp_path / "two", WEIGHTED)
    run(one)
    done = run_recipe(two, launcher=accelerate("cpu_ddp"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-5)


def test_an_error_names_the_source_before_anything_trains(tmp_path):
    path = project(tmp_path, WEIGHTED)
    (tmp_path / "data" / "images" / "train-3.png").unlink()
    with pytest.raises(DataError, match=r"^source 'pictures': .*one\.json:\d+: sample 3 .*train-3\.png"):
        run(path)


def test_a_run_trains_on_a_table_and_a_folder_and_asks_a_table(tmp_path):
    path = write_project(tmp_path)
    images = tmp_path / "data" / "images"
    lines = [f"train-{number}.png,bright?,{'yes' if number % 2 else 'no'}" for number in range(8)]
    table = tmp_path / "data" / "table.csv"
    table.write_text("\n".join(["picture,ask,say", *lines]) + "\n", encoding="utf-8")
    captions = tmp_path / "captions"
    captions.mkdir()
    for number in (8, 9):
        (captions / f"{number}.png").write_bytes((images / f"train-{number}.png").read_bytes())
        (captions / f"{number}.txt").write_text("a caption", encoding="utf-8")
    columns = {"image": "picture", "question": "ask", "answer": "say"}
    table_source = {"path": str(table), "media_root": str(images), "columns": columns}
    train = [table_source, {"path": str(captions), "question": "what?", "weight": 2}]
    path = write_project(tmp_path, stages=STAGE, data={"train": train, "eval": table_source})
    result = run(path)
    data = read_json(tmp_path / "run" / "data.json")
    assert [source["samples"] for source in data["train"]["sources"]] == [8, 2]
    assert (data["train"]["samples"], data["eval"]["samples"]) == (12, 8)
    assert result.scores["after"]
    assert run(path).stages[0]["status"] == "unchanged"
    train[1]["question"] = "what is there?"
    path = write_project(tmp_path, stages=STAGE, data={"train": train, "eval": table_source})
    assert run(path).stages[0]["status"] == "trained"
