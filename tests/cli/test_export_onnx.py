"""`mmpeft export onnx`: a run's adapter becomes graphs that answer, and what was compared is on disk."""

import json

import pytest
from typer.testing import CliRunner

from mmpeft import OnnxModel, answer, run
from mmpeft.cli.main import app
from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError
from mmpeft.export.agreement import Agreement
from tests.project import write_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    run(Recipe.from_yaml(write_project(folder)))
    return folder


def test_adapter_becomes_graphs_that_answer(project):
    out = project / "onnx"
    done = CliRunner().invoke(app, ["export", "onnx", str(project / "run" / "adapter"), str(out), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    parity = json.loads((out / "parity.json").read_text())
    assert found["parity"] == parity
    assert parity["passed"]
    assert parity["agreement"]["top1"] >= 0.95
    assert parity["agreement"]["tokens"] > 0
    assert (
        parity["bytes"]["export"] == sum(found["graphs"].values()) == sum(f.stat().st_size for f in out.glob("*.onnx*"))
    )
    model = OnnxModel.from_pretrained(out)
    picture = project / "data" / "images" / "eval-1.png"
    said = answer(model, model.processor, images=[picture], prompt="bright?", max_new_tokens=3)
    assert said
    words = ["--image", str(picture), "--prompt", "bright?", "--max-new-tokens", "3", "--json"]
    done = CliRunner().invoke(app, ["generate", str(out), *words])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["answer"] == said
    data = project / "data" / "eval.json"
    words = ["--data", str(data), "--media-root", str(data.parent / "images"), "--metric", "exact_match", "--json"]
    done = CliRunner().invoke(app, ["evaluate", str(out), *words, "--max-new-tokens", "3"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["metrics"] == parity["metrics"]["export"]
    for words, what in ((["--adapter", "x"], "takes no adapter"), (["--device", "cuda"], "answers on the CPU")):
        done = CliRunner().invoke(app, ["generate", str(out), "--prompt", "x", *words])
        assert isinstance(done.exception, RecipeError)
        assert what in str(done.exception)


def test_what_falls_below_has_status_1_and_names_layers(project, monkeypatch):
    out = project / "strict"
    monkeypatch.setattr("mmpeft.pipeline.export_gate.Said.against", lambda *_: Agreement(tokens=9, top1=0.5, kl=2.0))
    done = CliRunner().invoke(app, ["export", "onnx", str(project / "run" / "adapter"), str(out)])
    assert done.exit_code == 1
    assert "the same token is the most likely for 50.0%, and 95.0% are asked for" in done.output
    assert "most is changed by " in done.output
    parity = json.loads((out / "parity.json").read_text())
    assert not parity["passed"]
    layers = {each["name"]: each["error"] for each in parity["layers"]}
    assert "lm_head" in layers
    assert sum("language_model.layers" in name for name in layers) == 14
    assert all(0 < error < 0.03 for error in layers.values())


def test_without_comparison_it_does_not_pass(project):
    out = project / "alone"
    command = ["export", "onnx", str(project / "base"), str(out), "--precision", "fp32", "--no-parity"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads((out / "parity.json").read_text())["passed"] is False


def test_a_part_that_is_none(project):
    command = ["export", "onnx", str(project / "base"), str(project / "x"), "--include", "audio", "--no-parity"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, RecipeError)
    assert not (project / "x").exists()
