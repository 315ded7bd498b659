"""An int8 model is whole, is read by plain transformers, says what its source says, and cannot lose its int8 unseen."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import mmpeft
from mmpeft import Recipe
from mmpeft.core.errors import DataError, HubError, ModelError, OutputError, RecipeError
from mmpeft.core.memory import forget_peak
from mmpeft.export.agreement import Agreement
from mmpeft.export.coarse import w8a8
from mmpeft.export.int8 import Int8Export, Int8Settings, Measured
from mmpeft.export.merged_model import merge
from mmpeft.export.observe import observe, simulated
from mmpeft.export.smooth import smooth
from mmpeft.export.sources import find_source
from mmpeft.export.w8a8 import through_int8
from mmpeft.methods.checkpoint import save_model
from mmpeft.models.load import load_model
from mmpeft.pipeline.answering import open_model
from mmpeft.pipeline.export_gate import Gate, Threshold, concluded, fewest_left, shortfalls
from mmpeft.pipeline.publish import prepare
from tests.cli.test_main import call
from tests.project import TWO_STAGES, write_project

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

LAYER = "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run in bfloat16, with held-out data."""
    folder = tmp_path_factory.mktemp("run")
    path = write_project(folder, stages=[{**TWO_STAGES[1], "train": {"projector": "full", "language": {"r": 2}}}])
    return mmpeft.run(Recipe.from_yaml(path, ("dtype=bfloat16",))).output


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    return mmpeft.export_int8(run / "adapter", tmp_path_factory.mktemp("export") / "int8")


def merged(run):
    model, processor = load_model(run / "adapter")
    return model.merge_and_unload().eval(), processor


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_linear_layers_of_the_language_model_are_int8_and_nothing_else_is(exported):
    found = tensors(exported.result.output)
    whole = {name.removesuffix(".weight") for name, tensor in found.items() if tensor.dtype == torch.int8}
    assert len(whole) == len(exported.result.quantized) == 14
    assert all("language_model" in name and "layers" in name for name in whole)
    assert {name for name in found if name.endswith("_scale")} == {f"{name}.weight_scale" for name in whole}
    left = exported.result.left
    assert left["lm_head"] == "the head"
    assert left["model.multi_modal_projector.linear_1"] == "projector"
    assert {why for name, why in left.items() if "vision" in name} == {"vision"}
    after, before = exported.result.language
    assert after < 0.6 * before


def test_plain_transformers_reads_it_and_computes_what_int8_gives(exported, run):
    model = AutoModelForImageTextToText.from_pretrained(exported.result.output).eval()
    source, processor = merged(run)
    rows = processor(text="hello there", return_tensors="pt")
    with torch.no_grad(), simulated(source, exported.result.quantized):
        wanted = source(**rows).logits
    with torch.no_grad():
        found = model(**rows).logits
        assert not torch.equal(found, source(**rows).logits)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert mmpeft.answer(*load_model(exported.result.output), prompt="hello", max_new_tokens=2) is not None


def test_the_gate_compares_it_on_what_the_run_held_out(exported):
    parity = json.loads((exported.result.output / "parity.json").read_text(encoding="utf-8"))
    assert parity == exported.parity
    assert parity["passed"]
    assert parity["data"] == "data.eval of its run"
    assert parity["agreement"]["tokens"] > 0
    assert 0 < parity["agreement"]["kl"] < 0.05
    assert parity["metrics"]["source"].keys() == parity["metrics"]["export"].keys() != set()
    assert parity["bytes"]["export"] < parity["bytes"]["source"]
    errors = [each["error"] for each in parity["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert 0 < errors[0] < 0.1


def test_what_is_asked_of_it_and_missed_is_said_with_the_layers(monkeypatch, capsys, run, tmp_path):
    arguments = ["export", "int8", run / "adapter", tmp_path / "out", "--min-agreement", "1", "--max-drop", "0"]
    status, out, _ = call(monkeypatch, capsys, *arguments, "--json")
    assert status == 0
    assert json.loads(out)["parity"]["passed"]
    monkeypatch.setattr("mmpeft.pipeline.export_gate.Said.against", lambda *_: Agreement(tokens=9, top1=0.5, kl=2.0))
    status, out, _ = call(monkeypatch, capsys, *arguments)
    assert status == 1
    assert "the same token is the most likely for 50.0%, and 100.0% are asked for" in out
    assert "most is changed by model.language_model.layers" in out
    assert not json.loads((tmp_path / "out" / "parity.json").read_text(encoding="utf-8"))["passed"]


def test_what_was_not_compared_does_not_pass(run, tmp_path):
    done = mmpeft.export_int8(run / "adapter", tmp_path / "out", compare=False)
    assert done.parity == {"passed": False, "why": "it was not compared with its source"}
    with pytest.raises(RecipeError, match="need held-out samples"):
        mmpeft.export_int8(run / "adapter", tmp_path / "out", compare=False, settings=Int8Settings(smooth=0.5))
    (run / "stages" / "01-language" / "adapter").rename(tmp_path / "bare")
    with pytest.raises(DataError, match=r"nothing to compare the export on.*--data FILE"):
        mmpeft.export_int8(tmp_path / "bare", tmp_path / "other")
    (tmp_path / "bare").rename(run / "stages" / "01-language" / "adapter")


def test_layers_and_parts_are_left_or_taken_by_name(run):
    source = find_source(run / "adapter")
    left = Int8Export(source, Int8Settings(skip=(LAYER, "re:layers\\.1\\..*_proj"))).linears
    assert left.left[LAYER] == "skipped"
    assert {name for name in left.chosen if "layers.1" in name} == set()
    assert any("vision" in name for name in Int8Export(source, Int8Settings(include=("vision",))).linears.chosen)
    with pytest.raises(RecipeError, match=r"no linear layer is called 'down_prj'"):
        Int8Export(source, Int8Settings(skip=("down_prj",)))
    with pytest.raises(RecipeError, match=r"unknown part 'visoin'.*vision"):
        Int8Export(source, Int8Settings(include=("visoin",)))


def test_static_activations_have_their_scale_on_disk(run, tmp_path):
    done = mmpeft.export_int8(run / "adapter", tmp_path / "out", settings=Int8Settings(activations="static"))
    found = tensors(tmp_path / "out")
    assert sum(name.endswith("input_scale") for name in found) == len(done.result.quantized)
    assert done.parity["passed"]


def test_smoothing_leaves_the_model_as_it_is_and_takes_outliers_from_activations(run):
    model, processor = merged(run)
    rows = processor(text="a b c d", return_tensors="pt")
    linears = Int8Export(find_source(run / "adapter"), Int8Settings()).linears.chosen
    norm = model.get_submodule("model.language_model.layers.0.input_layernorm")
    norm.weight.data[3] = 80
    with torch.no_grad():
        before = model(**rows).logits
    seen = observe(model, linears, [rows], w8a8())
    query = "model.language_model.layers.0.self_attn.q_proj"
    stored = {name for name, _ in model.named_parameters()}
    steps = smooth(model, linears, seen, rows, strength=0.5, stored=stored)
    with torch.no_grad():
        assert torch.equal(model(**rows).logits, before)
    now = observe(model, linears, [rows], w8a8())
    assert now[query].largest.max() < 0.2 * seen[query].largest.max()
    assert now[query].error < seen[query].error
    assert {step.norm.rpartition(".")[2] for step in steps} == {"input_layernorm", "post_attention_layernorm"}


def test_a_smoothed_export_says_what_its_source_says(run, tmp_path):
    done = mmpeft.export_int8(run / "adapter", tmp_path / "out", settings=Int8Settings(smooth=0.5))
    assert done.parity["passed"]
    plain = tensors(run.parent / "base")
    name = next(name for name in plain if name.endswith("layers.0.input_layernorm.weight"))
    assert not torch.equal(tensors(tmp_path / "out")[name], plain[name].bfloat16())


def test_the_fewest_layers_are_left_that_will_do(run, tmp_path):
    layers = list("abcdefgh")
    assert fewest_left(layers, lambda left: len(left) >= 3) == ["a", "b", "c"]
    assert fewest_left(layers, lambda left: True) == []
    assert fewest_left(layers, lambda left: False) == layers
    assert fewest_left(layers, lambda left: {"b", "g"} <= set(left)) == ["b", "g"]
    # Where leaving more may harm, the last that can go goes too.
    assert fewest_left("abc", lambda left: left in (["a", "b", "c"], ["b", "c"], ["b"])) == ["b"]
    tight = Threshold(kl=-1.0)
    done = mmpeft.export_int8(run / "adapter", tmp_path / "out", auto_skip=True, threshold=Threshold(kl=1e-3))
    assert done.left_by_itself == ()
    with pytest.raises(RecipeError, match=r"auto_skip: no choice of layers in int8 passes .*--min-agreement"):
        mmpeft.export_int8(run / "adapter", tmp_path / "none", auto_skip=True, threshold=tight)


def test_layers_are_left_for_answers_as_well_where_tokens_are_near_enough(monkeypatch, run, tmp_path):
    """Answers are wrong while one layer is in int8."""
    seen = []

    def evaluate(settings, model, processor, dataset):
        seen.append(model.get_submodule(LAYER).weight.detach().clone())
        score = 0.9 if torch.equal(seen[0], seen[-1]) else 0.4
        return {"metrics": {"exact_match": score}, "predictions": [{"answer": "1"}], "seconds": 1.0}

    monkeypatch.setattr("mmpeft.pipeline.export_gate.evaluate_with", evaluate)
    done = mmpeft.export_int8(run / "adapter", tmp_path / "out", auto_skip=True)
    assert done.left_by_itself == (LAYER,)
    assert done.parity["passed"], done.parity["why"]


def test_what_is_no_number_comes_first_and_is_null_in_parity_json(tmp_path):
    gate = Gate.__new__(Gate)
    gate.held_out = SimpleNamespace(origin="here")
    gate._source = {"metrics": {}, "predictions": [{"answer": "1"}], "seconds": 1.0, "memory": None}
    scores = {"metrics": {}, "predictions": [{"answer": "1"}], "seconds": 1.0}
    found = Agreement(tokens=3, top1=0.0, kl=math.nan)
    layers = {"small": 0.01, "overflows": math.nan, "large": 0.5}
    parity = gate.verdict(found, scores, Threshold(kl=math.inf), sizes=(2, 1), layers=layers)
    assert "most is changed by overflows (nan%), large (50.0%)" in parity["why"]
    concluded(SimpleNamespace(output=tmp_path), parity)
    stored = json.loads((tmp_path / "parity.json").read_text(), parse_constant=pytest.fail)
    assert stored["layers"][0] == {"name": "overflows", "error": None}
    assert stored["agreement"]["kl"] is None


def test_a_gate_names_each_shortfall():
    found = Agreement(tokens=10, top1=0.9, kl=0.2)
    why = shortfalls(found, {"exact_match": 0.8}, {"exact_match": 0.7}, Threshold())
    assert len(why) == 3
    assert "exact_match falls from 0.800 to 0.700" in why
    assert shortfalls(Agreement(tokens=10, top1=1.0, kl=0.0), {"a": 0.8}, {"a": 0.79}, Threshold()) == []
    assert shortfalls(Agreement(tokens=0, top1=float("nan"), kl=float("nan")), {}, {}, Threshold())


def test_an_output_with_something_else_in_it_stays_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        mmpeft.export_int8(run / "adapter", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_int8_is_not_exported_or_trained_in_full_again(exported, tmp_path):
    model, processor = load_model(exported.result.output)
    mmpeft.answer(model, processor, prompt="hello", max_new_tokens=1)
    with pytest.raises(ModelError, match="read from int8 and is no longer that"):
        save_model(model, tmp_path / "saved")
    with pytest.raises(RecipeError, match=r"quantized \(compressed-tensors\)"):
        mmpeft.get_peft_model(model, {"language": "full"})
    assert mmpeft.get_peft_model(model, {"language": {"r": 2}}).peft_config
    with pytest.raises(ModelError, match="quantized already"):
        mmpeft.export_int8(exported.result.output, tmp_path / "out")
    done = merge(exported.result.output, tmp_path / "copy")
    assert sum(tensor.dtype == torch.int8 for tensor in tensors(done.output).values()) == 14
    with pytest.raises(HubError, match="not compared with its source"):
        prepare(done.output, "me/copy")


def test_rows_through_int8_are_near():
    weight = torch.randn(4, 9)
    assert (through_int8(weight) - weight).abs().max() <= weight.abs().amax() / 250


@pytest.mark.parametrize(("kind", "top1", "layers"), [("int8", 0.95, 14), ("nf4", 0.5, 2)])
def test_bitsandbytes_holds_linear_layers_and_says_much_the_same(run, tmp_path, kind, top1, layers):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    limits = Threshold(top1=top1, kl=1.0)
    done = mmpeft.export_bnb(run / "adapter", tmp_path / "out", kind=kind, threshold=limits)
    assert len(done.result.quantized) == layers
    assert all("language_model.layers" in name for name in done.result.quantized)
    assert done.result.bytes < done.result.before
    assert done.parity["passed"], done.parity["why"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model.get_submodule(LAYER)).__module__.startswith("bitsandbytes")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_layers_are_named_where_bitsandbytes_does_not_pass(run, tmp_path, kind):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    done = mmpeft.export_bnb(run / "adapter", tmp_path / "out", kind=kind, threshold=Threshold(kl=-1.0))
    assert not done.parity["passed"]
    assert "most is changed by model.language_model.layers" in done.parity["why"]
    found = {each["name"]: each["error"] for each in done.parity["layers"]}
    assert found.keys() == set(done.result.quantized)
    # Four bits change more than eight.
    assert all((0 < error < 0.03) if kind == "int8" else (0.03 < error < 0.3) for error in found.values())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_bitsandbytes_of_a_base_in_bfloat16_answers_on_a_cpu(run, tmp_path, kind):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base = shutil.copytree(run.parent / "base", tmp_path / "base")
    AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    limits = Threshold(top1=0.0, kl=9.0, drop=1.0)
    done = mmpeft.export_bnb(run / "adapter", tmp_path / "out", base=base, kind=kind, threshold=limits, device="cpu")
    assert done.parity["passed"], done.parity["why"]
    strict = Threshold(kl=-1.0)
    named = mmpeft.export_bnb(run / "adapter", tmp_path / "no", base=base, kind=kind, threshold=strict, device="cpu")
    assert all(0 < each["error"] < 0.3 for each in named.parity["layers"])
    assert len(named.parity["layers"]) == len(named.result.quantized)
    model, processor = open_model(str(tmp_path / "out"), device="cpu")
    assert model.dtype == torch.bfloat16
    picture = run.parent / "data" / "images" / "eval-1.png"
    assert isinstance(mmpeft.answer(model, processor, images=[picture], prompt="bright?", max_new_tokens=2), str)


def test_the_directory_of_a_run_means_its_adapter(run):
    assert hasattr(open_model(str(run), device="cpu")[0], "peft_config")


def test_static_activations_are_simulated_by_the_scale_that_was_measured(run, tmp_path):
    export = Int8Export(find_source(run / "adapter"), Int8Settings(activations="static"))
    source, processor = merged(run)
    rows = processor(text="hello there", return_tensors="pt")
    chosen = export.linears.chosen
    # Far too small, so that everything larger is cut off: a scale by token would not show it.
    largest = dict.fromkeys(chosen, 0.01)
    export.write(tmp_path / "out", Measured(largest=largest))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model(**rows).logits
        with simulated(source, chosen, largest=largest):
            wanted = source(**rows).logits
        with simulated(source, chosen):
            by_token = source(**rows).logits
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert (found - wanted).abs().max() < 0.2 * (found - by_token).abs().max()
    cut = observe(source, chosen, [rows], w8a8(largest))
    whole = observe(source, chosen, [rows], w8a8())
    assert all(cut[name].error > 2 * whole[name].error for name in chosen)


def test_auto_skip_tries_what_will_be_written(monkeypatch, run, tmp_path):
    seen = []
    monkeypatch.setattr("mmpeft.pipeline.export_int8.simulated", lambda *args, **named: seen.append(named) or once())
    for activations in ("dynamic", "static"):
        settings = Int8Settings(activations=activations)
        mmpeft.export_int8(run / "adapter", tmp_path / "out", settings=settings, auto_skip=True)
    dynamic, static = seen[0]["largest"], seen[-1]["largest"]
    assert dynamic is None
    assert len(static) == 14


def once():
    return contextlib.nullcontext()


@pytest.mark.parametrize("make", [mmpeft.export_int8, mmpeft.export_bnb])
def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_asked(make, monkeypatch, run, tmp_path):
    monkeypatch.setattr("mmpeft.pipeline.export_gate.Gate.ask_source", lambda *_: pytest.fail("it was asked"))
    (tmp_path / "thesis.tex").write_text("three years of work")
    with pytest.raises(OutputError, match=r"it holds thesis\.tex"):
        make(run / "adapter", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**6))
    with pytest.raises(OutputError, match="free space or choose another output"):
        make(run / "adapter", tmp_path / "out")


def test_no_room_for_what_the_source_says(monkeypatch, run, tmp_path):
    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("mmpeft.export.agreement.save_file", full)
    with pytest.raises(OutputError, match=r"the disk is full.*compare fewer \(--samples\), or set TMPDIR"):
        mmpeft.export_int8(run / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_memory_while_answering_is_that_of_both(exported):
    if not forget_peak("cpu"):
        pytest.skip("this system does not tell a peak of memory anew")
    memory = exported.parity["memory"]
    assert memory.keys() == {"source", "export"}
    assert all(10**8 < used < 10**11 for used in memory.values())


def test_what_a_killed_gate_has_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(20)
    for name in (f"mmpeft-parity-{ended.pid}-abc", f"mmpeft-parity-{os.getpid()}-abc", "mmpeft-parity-mine"):
        (tmp_path / name).mkdir()
    with Gate(None, None):
        left = {folder.name.rpartition("-")[0] for folder in tmp_path.iterdir()}
    assert left == {f"mmpeft-parity-{os.getpid()}", "mmpeft-parity"}
    assert len(list(tmp_path.iterdir())) == 2
