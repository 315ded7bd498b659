import json
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import mmpeft
from mmpeft import Recipe
from mmpeft.core.errors import DataError, OutputError, RecipeError
from mmpeft.core.files import read_json
from mmpeft.training.callbacks import read_metrics
from tests.plain import ENVIRONMENT, load_without_mmpeft
from tests.processes import accelerate, can_mount, run_recipe
from tests.project import TWO_STAGES, write_project


def run(path, **options):
    return mmpeft.run(Recipe.from_yaml(path), **options)


def statuses(result):
    return [stage["status"] for stage in result.stages]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_project(folder)
    return folder, path, run(path)


def test_a_run_writes_all_that_the_design_promises(finished):
    folder, _, result = finished
    written = {str(path.relative_to(folder / "run")) for path in (folder / "run").rglob("*") if path.is_file()}
    for name in (
        "recipe.yaml",
        "plan.json",
        "data.json",
        "run.json",
        "evaluation.json",
        "report.html",
        "stages/01-projector/stage.json",
        "stages/01-projector/metrics.jsonl",
        "stages/01-projector/adapter/adapter_model.safetensors",
        "stages/02-language/adapter/adapter_config.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/processor_config.json",
        "adapter/mmpeft.json",
        "adapter/README.md",
    ):
        assert name in written, name
    assert not [name for name in written if name.endswith((".bin", ".pt", ".pth", ".pkl", ".tmp"))]
    assert statuses(result) == ["trained", "trained"]
    assert set(result.scores) == {"before", "projector", "language", "after"}
    evaluation = read_json(folder / "run" / "evaluation.json")
    assert set(evaluation["after"]["by_kind"]) == {"亮", "light"}
    assert len(evaluation["before"]["predictions"]) == 4
    assert yaml.safe_load((folder / "run" / "recipe.yaml").read_text(encoding="utf-8"))["batch"]["size"] == 8


def test_the_adapter_gives_the_same_logits_and_answers_without_mmpeft(finished, tmp_path):
    folder, _, result = finished
    picture = folder / "data" / "images" / "eval-1.png"
    logits, answers = load_without_mmpeft(result.result, folder / "base", picture, "bright?", tmp_path)
    model, processor = mmpeft.load_model(str(result.result), device="cpu")
    pixels = processor.image_processor(Image.open(picture).convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = model(input_ids=logits["input_ids"], pixel_values=pixels).logits
    for way in ("auto", "peft"):
        assert (logits[way] - want).abs().max() <= 1e-5
        assert answers[way] == mmpeft.answer(model, processor, images=[picture], prompt="bright?", max_new_tokens=5)


def test_the_final_adapter_holds_the_work_of_both_stages(finished):
    folder, _, result = finished
    base = AutoModelForImageTextToText.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, result.result)
    moved = {name for name, p in model.named_parameters() if ".modules_to_save." in name or ".lora_B." in name}
    for name, parameter in model.named_parameters():
        if name in moved and ".lora_B." in name:
            assert parameter.abs().max() > 0, name
    first = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(folder / "base"), folder / "run" / "stages/01-projector/adapter"
    )
    original = base.model.multi_modal_projector.linear_1.original_module.weight
    after_one = first.base_model.model.model.multi_modal_projector.linear_1.modules_to_save["default"].weight
    after_two = base.model.multi_modal_projector.linear_1.modules_to_save["default"].weight
    moved_by_one = (after_one - original).abs().max()
    assert moved_by_one > 1e-3
    # Stage two goes on from stage one's projector at a tenth of its rate.
    assert (after_two - after_one).abs().max() < moved_by_one


def snapshot(folder):
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("report.html", "recipe.yaml", "plan.json", "data.json")
    }


def test_running_again_does_nothing(finished):
    folder, path, _ = finished
    before = snapshot(folder / "run")
    again = run(path)
    assert statuses(again) == ["unchanged", "unchanged"]
    assert snapshot(folder / "run") == before


def test_another_rate_in_stage_two_runs_stage_two_only(tmp_path):
    run(write_project(tmp_path))
    kept = snapshot(tmp_path / "run" / "stages" / "01-projector")
    changed = [TWO_STAGES[0], {**TWO_STAGES[1], "learning_rate": {"projector": 1e-3, "language": 5e-3}}]
    result = run(write_project(tmp_path, stages=changed))
    assert statuses(result) == ["unchanged", "trained"]
    assert snapshot(tmp_path / "run" / "stages" / "01-projector") == kept


def test_another_picture_runs_everything_again(tmp_path):
    path = write_project(tmp_path, stages=TWO_STAGES[:1])
    run(path)
    assert statuses(run(path)) == ["unchanged"]
    picture = tmp_path / "data" / "images" / "train-3.png"
    picture.write_bytes((tmp_path / "data" / "images" / "train-4.png").read_bytes())
    assert statuses(run(path)) == ["trained"]


def test_a_full_tower_writes_a_model_and_a_later_adapter_points_to_it(tmp_path):
    stages = [
        TWO_STAGES[0],
        {"name": "tower", "train": {"language": "full"}, "learning_rate": 1e-3, "max_steps": 2},
        {"name": "lora", "train": {"language": {"r": 2}}, "learning_rate": 1e-2, "max_steps": 2},
    ]
    result = run(write_project(tmp_path, stages=stages))
    stage = tmp_path / "run" / "stages" / "02-tower"
    assert (stage / "model" / "model.safetensors").exists()
    assert read_json(stage / "stage.json")["output"] == "model"
    assert read_json(result.result / "adapter_config.json")["base_model_name_or_path"] == str(stage / "model")
    model = AutoModelForImageTextToText.from_pretrained(stage / "model")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    projector = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"),
        tmp_path / "run/stages/01-projector/adapter",
    ).merge_and_unload()
    # Stage one's projector was carried into the model; the language model's own weights moved.
    trained = projector.model.multi_modal_projector.linear_1.weight
    assert torch.equal(model.model.multi_modal_projector.linear_1.weight, trained)
    assert not torch.equal(model.model.language_model.norm.weight, base.model.language_model.norm.weight)
    assert mmpeft.load_model(str(result.result), device="cpu")


def test_a_part_trained_earlier_stays_in_the_adapter_when_a_later_stage_leaves_it_alone(tmp_path):
    stages = [TWO_STAGES[0], {"name": "language", "train": {"language": {"r": 4}}, "max_steps": 2}]
    result = run(write_project(tmp_path, stages=stages))
    plan = read_json(tmp_path / "run" / "plan.json")["stages"][1]["parts"]
    assert plan["projector"]["state"] == "carried"
    one = load_file(tmp_path / "run/stages/01-projector/adapter/adapter_model.safetensors")
    two = load_file(result.result / "adapter_model.safetensors")
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    assert any(".lora_A." in name for name in two)


def command(path, *options):
    return [sys.executable, "-m", "mmpeft", "run", str(path), *options]


SLOW_STAGE = [
    {
        **TWO_STAGES[0],
        # Dropout draws from the process's generator: who takes a number more from it has other weights.
        "train": {"projector": "full", "language": {"r": 4, "lora_dropout": 0.2}},
        "max_steps": 60,
        "trainer": {"save_steps": 5, "save_total_limit": 2},
    }
]


def start_and_wait_for(path, metrics, step):
    process = subprocess.Popen(
        command(path), env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in read_metrics(metrics)):
            return process
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def weights(folder):
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    run(write_project(folder, stages=SLOW_STAGE))
    return weights(folder)


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_weights(tmp_path, uninterrupted):
    path = write_project(tmp_path, stages=SLOW_STAGE)
    stage = tmp_path / "run" / "stages" / "01-projector"
    process = start_and_wait_for(path, stage / "metrics.jsonl", 7)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "report.html").exists()
    state = read_json(stage / "stage.json")
    assert state["status"] == "interrupted"
    done = subprocess.run(command(path), env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "goes on from step" in done.stdout
    got = weights(tmp_path)
    assert all(torch.equal(got[name], tensor) for name, tensor in uninterrupted.items())
    assert [row["step"] for row in read_metrics(stage / "metrics.jsonl")] == list(range(1, 61))


def test_a_kill_leaves_a_run_that_resumes_to_the_same_weights(tmp_path, uninterrupted):
    path = write_project(tmp_path, stages=SLOW_STAGE)
    stage = tmp_path / "run" / "stages" / "01-projector"
    process = start_and_wait_for(path, stage / "metrics.jsonl", 13)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "run" / "adapter").exists()
    result = run(path)
    assert read_json(stage / "stage.json")["resumed_from"] >= 5
    assert statuses(result) == ["trained"]
    got = weights(tmp_path)
    assert all(torch.equal(got[name], tensor) for name, tensor in uninterrupted.items())


def packed_and_changed(folder):
    """The same with packed rows, samples on one picture together, and samples that change from epoch to epoch."""
    data = yaml.safe_load(write_project(folder).read_text(encoding="utf-8"))["data"]
    augment = {"crop": {"area": [0.3, 0.9]}, "flip": True, "paraphrase": {"bright?": ["light?", "is it bright?"]}}
    batch = {"size": 8, "packing": True, "share_media": True}
    return write_project(folder, stages=SLOW_STAGE, batch=batch, data={**data, "augment": augment})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random_moments_leave_the_same_weights(tmp_path):
    """Loading, training or in the middle of a checkpoint: each run is killed a few times, until one comes through."""
    run(packed_and_changed(tmp_path / "whole"))
    uninterrupted = weights(tmp_path / "whole")
    speedups = read_json(tmp_path / "whole/run/stages/01-projector/stage.json")["figures"]["speedups"]
    assert {"batch.packing", "batch.share_media"} <= {each["name"] for each in speedups if each["on"]}
    moments = random.Random(0)
    path, kills, folder = packed_and_changed(tmp_path / "0"), 0, tmp_path / "0"
    while kills < 20:
        process = subprocess.Popen(
            command(path), env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            _, errors = process.communicate(timeout=moments.uniform(4, 14))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=60)
            kills += 1
            continue
        assert process.returncode == 0, errors
        _same(weights(folder), uninterrupted)
        folder = tmp_path / str(kills)
        path = packed_and_changed(folder)
    run(path)
    _same(weights(folder), uninterrupted)


def _same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("micro", [4, None])
def test_two_processes_have_the_losses_of_one(tmp_path, micro):
    """22 samples in batches of 8: the last step of an epoch has 6, three for each process."""
    stages = [{**stage, "max_steps": None, "epochs": 2} for stage in TWO_STAGES]
    batch = {"size": 8} if micro is None else {"size": 8, "micro": micro}
    one, two = tmp_path / "one", tmp_path / "two"
    run(write_project(one, stages=stages, batch=batch))
    path = write_project(two, stages=stages, batch=batch)
    done = run_recipe(path, launcher=accelerate("cpu_ddp"), timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert read_json(two / "run" / "run.json")["processes"] == 2
    for stage in ("01-projector", "02-language"):
        rows = [read_metrics(folder / "run" / "stages" / stage / "metrics.jsonl") for folder in (one, two)]
        assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(1, 7))
        assert [row["loss"] for row in rows[0]] == pytest.approx([row["loss"] for row in rows[1]], abs=1e-5)
    evaluations = [read_json(folder / "run" / "evaluation.json")["after"] for folder in (one, two)]
    answers = [[row["answer"] for row in entry["predictions"]] for entry in evaluations]
    assert answers[0] == answers[1]


def test_bf16_weights_train_and_answer(tmp_path):
    result = run(write_project(tmp_path, dtype="bfloat16"))
    assert {t.dtype for t in load_file(result.result / "adapter_model.safetensors").values()} == {torch.float32}
    rows = read_metrics(tmp_path / "run/stages/02-language/metrics.jsonl")
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows)


def test_the_trainers_own_evaluation_has_the_held_out_data(tmp_path):
    trainer = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    stages = [{**TWO_STAGES[0], "trainer": trainer}]
    result = run(write_project(tmp_path, stages=stages))
    rows = read_metrics(tmp_path / "run/stages/01-projector/metrics.jsonl")
    held_out = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    assert list(held_out) == [2, 4]
    assert all(loss > 0 for loss in held_out.values())
    assert result.report.exists()


def test_an_evaluation_without_held_out_data_is_an_error(tmp_path):
    path = write_project(tmp_path, stages=[{**TWO_STAGES[0], "trainer": {"eval_strategy": "steps", "eval_steps": 2}}])
    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    path = write_project(
        tmp_path, stages=[{**TWO_STAGES[0], "trainer": {"eval_strategy": "steps"}}], data={**data, "eval": None}
    )
    with pytest.raises(RecipeError, match=r"stages.projector.trainer.eval_strategy: .* give data.eval"):
        run(path)


def test_a_batch_that_cannot_be_cut_is_an_error_before_anything_runs(tmp_path):
    with pytest.raises(RecipeError, match=r"batch.micro: 3 does not divide the 8 samples .* use one of 1, 2, 4, 8"):
        run(write_project(tmp_path, batch={"size": 8, "micro": 3}))
    assert not (tmp_path / "run" / "stages").exists()


def test_a_stage_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no stage 'langauge' in the recipe; it has: projector, language"):
        run(write_project(tmp_path), until="langauge")


def test_stopping_early_leaves_the_result_of_a_whole_run_alone(tmp_path):
    path = write_project(tmp_path)
    run(path)
    before = snapshot(tmp_path / "run")
    result = run(path, until="projector")
    assert result.result == tmp_path / "run" / "stages" / "01-projector" / "adapter"
    assert snapshot(tmp_path / "run") == before


def test_stopping_early_the_first_time_writes_no_final_adapter(tmp_path):
    result = run(write_project(tmp_path), until="projector")
    assert (result.result / "adapter_model.safetensors").exists()
    assert not (tmp_path / "run" / "adapter").exists()
    assert set(result.scores) == {"before", "projector"}


def test_a_projector_stage_on_text_alone_is_an_error(tmp_path):
    path = write_project(tmp_path, stages=TWO_STAGES[:1])
    turns = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "data" / "train.json").write_text(json.dumps([{"id": "1", "conversations": turns}]))
    with pytest.raises(RecipeError, match=r"stages.projector: it trains only projector, but no sample of .* picture"):
        run(path)


def test_an_output_that_is_a_file_is_an_error(tmp_path):
    path = write_project(tmp_path)
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="a file of that name exists"):
        run(path)


def test_a_corrupt_picture_is_named_or_skipped_counted_and_listed(tmp_path):
    path = write_project(tmp_path)
    picture = tmp_path / "data" / "images" / "train-5.png"
    picture.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(DataError, match=r"train-5\.png"):
        run(path)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))["data"]
    result = run(write_project(tmp_path, data={**data, "on_error": "skip", "max_skipped": 2}))
    skipped = read_json(tmp_path / "run" / "data.json")["train"]["skipped"]
    assert [row["index"] for row in skipped] == [5]
    assert "train-5.png" in skipped[0]["reason"]
    assert "train-5.png" in result.report.read_text(encoding="utf-8")


@pytest.mark.skipif(not can_mount(), reason="no user namespaces here, so no file system to fill up")
def test_a_disk_that_fills_up_leaves_whole_checkpoints_and_a_clear_error(tmp_path):
    """A real, small file system (tmpfs in a namespace of its own) that checkpoints fill up."""
    stages = [{**TWO_STAGES[0], "max_steps": 40, "trainer": {"save_steps": 1, "save_total_limit": 40}}]
    path = write_project(tmp_path, stages=stages, output=str(tmp_path / "small" / "run"))
    (tmp_path / "small").mkdir()
    script = (
        f"mount -t tmpfs -o size=600k tmpfs {tmp_path}/small && "
        f"{sys.executable} -m mmpeft run {path}; status=$?; cp -r {tmp_path}/small/run {tmp_path}/left; exit $status"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "left" / "adapter").exists()
    checkpoints = list((tmp_path / "left" / "stages" / "01-projector" / "checkpoints").iterdir())
    assert checkpoints
    for checkpoint in checkpoints:
        assert read_json(checkpoint / "trainer_state.json")["global_step"] == int(checkpoint.name.split("-")[1])
        load_file(checkpoint / "adapter_model.safetensors")
        torch.load(checkpoint / "optimizer.pt", weights_only=True)


@pytest.mark.skipif(not can_mount(), reason="no user namespaces here, so no file system that is read-only for root")
def test_a_read_only_output_is_an_error_before_anything_runs(tmp_path):
    path = write_project(tmp_path, output=str(tmp_path / "locked" / "run"))
    (tmp_path / "locked").mkdir()
    script = f"mount -t tmpfs -o ro tmpfs {tmp_path}/locked && {sys.executable} -m mmpeft run {path}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the file system is read-only: choose another `output`" in done.stderr
    assert "Traceback" not in done.stderr


def stage(name, train):
    return {"name": name, "train": train, "learning_rate": 1e-2, "max_steps": 2}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_stage_carries_on_lora_that_started_from_the_base_weights(tmp_path, init):
    first = stage("language", {"language": {"r": 4, "init_lora_weights": init}})
    path = write_project(tmp_path, stages=[first, stage("projector", {"projector": "full"})])
    result = run(path)
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "run" / "stages" / "01-language" / "adapter", result.result)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(after) == len(before) + 4
    config = read_json(result.result / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


@pytest.mark.parametrize("change", [{"init_lora_weights": "pissa"}, {"lora_alpha": 32}, {"use_dora": True}])
def test_a_stage_that_would_change_what_an_earlier_one_trained_is_refused_before_anything_trains(tmp_path, change):
    stages = [stage("one", {"language": {"r": 4}}), stage("two", {"language": {"r": 4, **change}})]
    with pytest.raises(RecipeError, match=f"train.language.{next(iter(change))}: .*earlier stage"):
        run(write_project(tmp_path, stages=stages))
    assert not (tmp_path / "run" / "stages").exists()
