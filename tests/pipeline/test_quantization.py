"""Runs on a frozen language model in 8 or 4 bits: they train, answer, go on, and leave an ordinary adapter."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

import mmpeft
from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError
from mmpeft.core.files import read_json
from mmpeft.pipeline.run import plan
from tests.processes import figures, losses, run_recipe
from tests.project import write_base, write_project

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture
def project(tmp_path):
    path = write_project(tmp_path)
    write_base(tmp_path / "base", hidden=64)
    return path


def run(path, *overrides):
    return mmpeft.run(Recipe.from_yaml(path, overrides))


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_run_leaves_an_adapter_for_the_whole_base(project, tmp_path, kind):
    run(project, f"output={tmp_path / 'whole'}")
    result = run(project, f"quantization={kind}")
    # Evaluated within training too, on the same matrices.
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert ours != theirs
        assert ours == pytest.approx(theirs, rel=0.02)
    assert read_json(result.result / "mmpeft.json")["recipe"]["quantization"] == kind
    parts = read_json(tmp_path / "run" / "plan.json")["stages"][1]["parts"]
    assert parts == read_json(tmp_path / "whole" / "plan.json")["stages"][1]["parts"]
    assert figures(tmp_path / "run")[1]["total_parameters"] == figures(tmp_path / "whole")[1]["total_parameters"]
    weights = load_file(result.result / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    PeftModel.from_pretrained(base, result.result)
    mmpeft.merge(result.result, tmp_path / "merged")
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")


@pytest.mark.slow
def test_another_quantization_trains_again_and_the_same_does_not(project):
    assert [stage["status"] for stage in run(project).stages] == ["trained", "trained"]
    assert [stage["status"] for stage in run(project, "quantization=nf4").stages] == ["trained", "trained"]
    assert [stage["status"] for stage in run(project, "quantization=nf4").stages] == ["unchanged", "unchanged"]


@pytest.mark.slow
def test_evaluation_within_training_changes_nothing(project, tmp_path):
    """bitsandbytes packs four bits anew at an answer on a CPU, and backward would not go through it."""
    run(project, "quantization=nf4", f"output={tmp_path / 'alone'}")
    run(project, "quantization=nf4", "stages.1.trainer={eval_strategy: steps, eval_steps: 2}")
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


def test_a_plan_counts_the_bits_and_needs_no_weights(project, tmp_path):
    for file in (tmp_path / "base").glob("*.safetensors"):
        file.unlink()
    whole, eight, four = (
        plan(Recipe.from_yaml(project, (f"quantization={kind}",)))[1]["memory"]["weights"]
        for kind in ("none", "int8", "nf4")
    )
    matrices = sum(
        module.weight.numel()
        for name, module in LlavaForConditionalGeneration(
            LlavaForConditionalGeneration.config_class.from_pretrained(tmp_path / "base")
        ).named_modules()
        if ".language_model.layers." in name and isinstance(module, torch.nn.Linear)
    )
    assert whole - eight == 3 * matrices
    assert whole - four == pytest.approx(3.4375 * matrices, abs=1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("stages.1.train={projector: full, language: full}",), "train.language: full writes a whole model"),
        (("stages.0.train={vision: full}",), "train.vision: full writes a whole model"),
        (("stages.1.distributed=fsdp2",), "fsdp2 shares out weights or states"),
        (("stages.1.distributed={tensor_parallel: 2}",), "use ddp or context_parallel"),
        (("quantization=int4",), "quantization"),
    ],
)
def test_what_cannot_be_quantized_is_named(project, overrides, said):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(project, ("quantization=nf4", *overrides))
    assert said in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("distributed", ["ddp", "{context_parallel: 2}"])
def test_two_processes_follow_one(project, tmp_path, distributed):
    run(project, "quantization=nf4", f"output={tmp_path / 'one'}")
    words = [f"stages.{number}.distributed={distributed}" for number in (0, 1)]
    done = run_recipe(project, "quantization=nf4", "processes=2", f"output={tmp_path / 'two'}", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_a_launcher_that_shares_weights_out_is_refused(project):
    env = {"ACCELERATE_USE_FSDP": "true"}
    done = run_recipe(project, "quantization=nf4", "processes=2", env=env)
    assert done.returncode != 0
    assert "is for ddp and context_parallel, and the launcher's settings say fsdp2" in done.stderr
