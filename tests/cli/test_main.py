import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from mmpeft.cli.main import app, main
from mmpeft.core.files import read_json
from mmpeft.pipeline.quickstart import quickstart_recipe
from tests.project import TWO_STAGES, write_project
from tests.tiny import tiny_clip, tiny_image_processor, tiny_llama, tiny_tokenizer


@pytest.fixture(autouse=True)
def _same_afterwards(monkeypatch):
    """The program sets environment and log levels for itself; other tests keep theirs."""
    for name in ("TRANSFORMERS_VERBOSITY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    level = logging.getLogger("mmpeft").level
    yield
    logging.getLogger("mmpeft").setLevel(level)


def call(monkeypatch, capsys, *arguments):
    """Exit status, stdout and stderr of the program."""
    monkeypatch.setattr(sys, "argv", ["mmpeft", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    out, errors = capsys.readouterr()
    return caught.value.code or 0, out, errors


def test_every_command_has_a_help_with_a_sentence():
    text = CliRunner().invoke(app, ["--help"]).output
    for name in ("quickstart", "run", "plan", "evaluate", "generate", "data", "recipes"):
        assert name in text
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_a_bad_recipe_is_status_2_with_every_problem(tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text("modle: m\ndata: {train: t, on_eror: skip}\nstages: two-stag\n")
    status, out, errors = call(monkeypatch, capsys, "run", path)
    assert status == 2
    assert out == ""
    for said in ("did you mean 'model'?", "did you mean 'on_error'?", "did you mean 'two-stage'?"):
        assert said in errors
    assert "Traceback" not in errors


def test_wrong_use_is_status_2(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "run")[0] == 2
    assert call(monkeypatch, capsys, "nothing")[0] == 2


def test_bad_data_is_status_3(tmp_path, monkeypatch, capsys):
    path = write_project(tmp_path)
    (tmp_path / "data" / "train.json").write_text('[{"id": "1", "image": "a.png", "conv')
    status, _, errors = call(monkeypatch, capsys, "run", path)
    assert status == 3
    assert "train.json" in errors


def test_a_model_that_is_not_there_is_status_1(monkeypatch, capsys):
    status, _, errors = call(monkeypatch, capsys, "generate", "./nowhere", "--prompt", "x")
    assert status == 1
    assert "nowhere" in errors


def test_run_plan_generate_and_evaluate_from_the_command_line(tmp_path, monkeypatch, capsys):
    path = write_project(tmp_path)
    status, out, errors = call(monkeypatch, capsys, "plan", path, "--json")
    assert status == 0, errors
    plan = json.loads(out)["stages"]
    assert [stage["steps"] for stage in plan] == [4, 6]
    assert plan[1]["parts"]["language"]["state"] == "lora"
    status, out, errors = call(monkeypatch, capsys, "run", path, "--set", "stages.language.max_steps=2", "--json")
    assert status == 0, errors
    result = json.loads(out)
    assert [stage["status"] for stage in result["stages"]] == ["trained", "trained"]
    assert "held out, before" in errors
    picture = tmp_path / "data" / "images" / "eval-1.png"
    arguments = ["generate", result["result"], "--image", picture, "--prompt", "bright?", "--max-new-tokens", "3"]
    status, out, errors = call(monkeypatch, capsys, *arguments, "--json")
    assert status == 0, errors
    answer = json.loads(out)["answer"]
    data = ["--data", tmp_path / "data" / "eval.json", "--media-root", tmp_path / "data" / "images"]
    options = ["--metric", "exact_match", "--max-new-tokens", "3", "--json"]
    status, out, errors = call(monkeypatch, capsys, "evaluate", result["result"], *data, *options)
    assert status == 0, errors
    scores = json.loads(out)
    after = read_json(tmp_path / "run" / "evaluation.json")["after"]
    assert scores["metrics"] == after["metrics"]
    assert [row["answer"] for row in scores["predictions"]] == [row["answer"] for row in after["predictions"]]
    assert isinstance(answer, str)


def test_the_plan_for_people_is_a_table(tmp_path, monkeypatch, capsys):
    status, out, errors = call(monkeypatch, capsys, "plan", write_project(tmp_path, stages=TWO_STAGES[:1]))
    assert status == 0, errors
    assert "22 samples, 4 steps of 8 (4 at once, 2 accumulated, 1 process(es))" in out
    budget = ("--set", "batch={size: 8, tokens: 500}")
    _, out, _ = call(monkeypatch, capsys, "plan", tmp_path / "recipe.yaml", *budget)
    assert "4 steps of 8 (at most 500 tokens at once, 1 process(es))" in out
    assert "1,600" in out


def test_a_composed_model_comes_from_the_recipe_and_is_made_once(tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer(image_token=False)
    for name, parts in (
        ("vision", (tiny_clip(), tiny_image_processor())),
        ("language", (tiny_llama(tokenizer), tokenizer)),
    ):
        for part in parts:
            part.save_pretrained(tmp_path / name)
    model = {"vision": str(tmp_path / "vision"), "language": str(tmp_path / "language"), "vision_feature_layer": -1}
    path = write_project(tmp_path, model=model, stages=TWO_STAGES[:1])
    status, _, errors = call(monkeypatch, capsys, "run", path, "--json")
    assert status == 0, errors
    base = tmp_path / "run" / "model"
    assert read_json(base / "config.json")["architectures"] == ["LlavaForConditionalGeneration"]
    assert read_json(tmp_path / "run/adapter/adapter_config.json")["base_model_name_or_path"] == str(base)
    made = (base / "model.safetensors").stat().st_mtime_ns
    status, out, errors = call(monkeypatch, capsys, "run", path, "--json")
    assert json.loads(out)["stages"][0]["status"] == "unchanged", errors
    assert (base / "model.safetensors").stat().st_mtime_ns == made
    # A run that was moved as a whole still finds its base.
    (tmp_path / "run").rename(tmp_path / "moved")
    arguments = ["generate", tmp_path / "moved" / "adapter", "--prompt", "bright?", "--max-new-tokens", "2"]
    assert call(monkeypatch, capsys, *arguments)[0] == 0


def test_python_m_mmpeft_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "mmpeft", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mmpeft 0.")


ENDING = """
import atexit, os, sys
from mmpeft.cli.main import app, main

class TakenApart:
    def __del__(self):
        os.abort()

@app.command("leave")
def leave():
    # No collector runs before the interpreter takes itself apart, as none does for what a thread of C++ holds.
    sys.modules["builtins"].kept = TakenApart()
    atexit.register(print, "farewell")
    print("done")

sys.argv = ["mmpeft", "leave"]
main()
"""


@pytest.mark.parametrize(("launched", "ended_by"), [({}, signal.SIGABRT), ({"RANK": "0"}, 0)])
def test_one_process_of_several_ends_before_the_interpreter_is_taken_apart(launched, ended_by):
    environment = os.environ | launched
    done = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, env=environment)
    assert done.stdout == "done\nfarewell\n"
    assert done.returncode == -ended_by


def test_help_needs_neither_torch_nor_transformers():
    program = (
        "import sys; from typer.testing import CliRunner; from mmpeft.cli.main import app; "
        "CliRunner().invoke(app, ['--help']); print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_quickstarts_recipe_parses():
    recipe = quickstart_recipe(Path("x"), language="l", compose=True, seed=3, smallest=True)
    assert [stage.max_steps for stage in recipe.stages] == [2, 2]
    assert yaml.safe_dump(recipe.to_dict())
    other = quickstart_recipe(Path("x"), language="some/vlm", compose=False, seed=0, smallest=False)
    assert other.model == "some/vlm"


def test_ctrl_c_is_said_and_is_status_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mmpeft.pipeline.answering.load_model", interrupted)
    status, out, errors = call(monkeypatch, capsys, "generate", "x", "--prompt", "x", "--json")
    assert (status, out) == (130, "")
    assert "stopped; the same command goes on from what had been written" in errors


def test_one_of_several_processes_prints_the_object():
    program = "from mmpeft.cli.output import human, print_json; print_json({'a': 1}); human(False).print('b')"
    for rank, want in (("0", '{"a": 1}\nb\n'), ("1", "")):
        done = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"RANK": rank}, capture_output=True, text=True, check=True
        )
        assert done.stdout == want


def test_an_unknown_metric_is_named_before_a_question_is_asked(tmp_path, monkeypatch, capsys):
    write_project(tmp_path)
    monkeypatch.setattr("mmpeft.pipeline.evaluate.answer_questions", lambda *_, **__: pytest.fail("asked"))
    data = ["--data", tmp_path / "data" / "eval.json", "--media-root", tmp_path / "data" / "images"]
    status, _, errors = call(monkeypatch, capsys, "evaluate", tmp_path / "base", *data, "--metric", "exact_mach")
    assert status == 2
    assert "did you mean 'exact_match'?" in errors


def test_a_plan_leaves_what_a_run_wrote_as_it_is(tmp_path, monkeypatch, capsys):
    path = write_project(tmp_path)
    assert call(monkeypatch, capsys, "plan", path)[0] == 0
    assert not (tmp_path / "run").exists()
    assert call(monkeypatch, capsys, "run", path)[0] == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("recipe.yaml", "plan.json", "data.json")}
    assert call(monkeypatch, capsys, "plan", path, "--set", "stages.language.max_steps=9")[0] == 0
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("report_to=wandbb", "trainer.report_to: unknown tracker 'wandbb'; did you mean 'wandb'?"),
        ("report_to=neptune", "trainer.report_to: neptune is not installed"),
        ("optim=adamw_bnb_8bit", "trainer.optim: You need to install `bitsandbytes`"),
        ("optim=adamw_foo", "trainer: adamw_foo is not a valid OptimizerNames"),
        ("eval_strategy=epoch", "trainer.eval_strategy: there is nothing to evaluate on; give data.eval"),
    ],
)
def test_what_a_later_stage_cannot_have_is_named_before_the_first_is_trained(
    tmp_path, monkeypatch, capsys, setting, said
):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda *_: False)
    monkeypatch.setattr("mmpeft.pipeline.arguments.get_available_reporting_integrations", list)
    changed = [f"--set=stages.language.trainer.{setting}", "--set=data.eval=null"]
    status, _, errors = call(monkeypatch, capsys, "run", write_project(tmp_path), *changed)
    assert status == 2
    assert f"stages.language.{said}" in errors
    assert not (tmp_path / "run" / "stages").exists()


def test_a_url_reaches_the_message_as_it_was_given(tmp_path, monkeypatch, capsys):
    write_project(tmp_path)
    arguments = ["generate", tmp_path / "base", "--image", "https://x/y.png", "--prompt", "x"]
    status, _, errors = call(monkeypatch, capsys, *arguments)
    assert status == 3
    assert "picture 'https://x/y.png' is a URL" in errors
