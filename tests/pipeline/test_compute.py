"""Runs with each switch of the `compute` block: the same losses, and what each spared in the records."""

import shutil

import pytest
import torch
from transformers import TrainingArguments

import mmpeft
from mmpeft import Recipe
from mmpeft.core.errors import RecipeError
from mmpeft.core.files import read_json
from mmpeft.models.block_attention import blocks_pay
from mmpeft.pipeline.compute import plan_compute, why_uncompiled
from mmpeft.training.callbacks import read_metrics
from tests.families.qwen import QWEN
from tests.models.test_tree_attention import llava_around
from tests.project import TWO_STAGES, write_data, write_project
from tests.tiny import tiny_processor


def run(folder, *, packing=None, **compute):
    batch = {"size": 4, "packing": packing}
    path = write_project(folder, stages=[{**TWO_STAGES[1], "max_steps": 3}], batch=batch, compute=compute)
    mmpeft.run(Recipe.from_yaml(path))
    stage = next((folder / "run" / "stages").iterdir())
    figures = read_json(stage / "stage.json")["figures"]
    speedups = {each["name"]: each for each in figures["speedups"] if each["name"].startswith("compute.")}
    return [row["loss"] for row in read_metrics(stage / "metrics.jsonl")], speedups


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    off = {
        "supervised_only": False,
        "chunked_loss": False,
        "checkpointing": False,
        "spare_casts": False,
        "fuse_lora": False,
        "block_attention": False,
        "spare_cache": False,
        "linear_patches": False,
        "npu_kernels": False,
        "copy_ahead": False,
        "compile": False,
    }
    return run(tmp_path_factory.mktemp("plain"), **off)


def test_everything_off_says_so(plain):
    losses, speedups = plain
    assert len(losses) == 3
    assert not any(each["on"] or each["saved"] for each in speedups.values())
    assert speedups["compute.chunked_loss"]["why"] == "compute.chunked_loss is false"
    assert speedups["compute.supervised_only"]["why"] == "compute.supervised_only is false"


@pytest.mark.parametrize(
    ("switches", "on", "saved"),
    [
        ({}, "compute.supervised_only", "logits"),
        ({"chunked_loss": True}, "compute.chunked_loss", None),
        ({"checkpointing": True}, "compute.checkpointing", None),
        ({"fuse_lora": True}, "compute.fuse_lora", None),
        ({"spare_cache": True}, "compute.spare_cache", "bytes"),
        ({"spare_mask": True, "packing": False}, "compute.spare_mask", "entries of masks"),
    ],
)
def test_each_switch_gives_the_losses_of_none(tmp_path, plain, switches, on, saved):
    losses, speedups = run(tmp_path, **switches)
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert speedups[on]["on"]
    assert saved is None or speedups[on]["saved"][saved] > 100


def test_a_family_whose_forward_computes_every_logit_is_spared_them_too(tmp_path):
    model, processor = QWEN["qwen2_5_omni"]()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    write_data(tmp_path / "data")
    losses = []
    for supervised in (False, True):
        path = write_project(
            tmp_path,
            model=str(tmp_path / "base"),
            stages=[{**TWO_STAGES[1], "max_steps": 2}],
            compute={"supervised_only": supervised},
            output=str(tmp_path / str(supervised)),
        )
        mmpeft.run(Recipe.from_yaml(path))
        stage = next((tmp_path / str(supervised) / "stages").iterdir())
        losses.append([row["loss"] for row in read_metrics(stage / "metrics.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    named = {each["name"]: each for each in read_json(stage / "stage.json")["figures"]["speedups"]}
    assert named["compute.supervised_only"]["saved"]["logits"] > 100


def half_precision(folder, switch, **compute):
    """Losses in bfloat16 with a switch of the block off, and on; the records say which."""
    found = []
    for on in (False, True):
        path = write_project(
            folder,
            stages=[{**TWO_STAGES[1], "max_steps": 3}],
            dtype="bfloat16",
            compute={**compute, switch: on},
            output=str(folder / str(on)),
        )
        mmpeft.run(Recipe.from_yaml(path))
        stage = next((folder / str(on) / "stages").iterdir())
        found.append([row["loss"] for row in read_metrics(stage / "metrics.jsonl")])
        named = {each["name"]: each for each in read_json(stage / "stage.json")["figures"]["speedups"]}
        assert named[f"compute.{switch}"]["on"] is on
    return found


def test_half_precision_takes_the_same_steps_without_the_casts(tmp_path):
    casting, spared = half_precision(tmp_path, "spare_casts", fuse_lora=False)
    assert casting == spared


@pytest.mark.skipif(
    not blocks_pay(torch.zeros(1, dtype=torch.bfloat16)), reason="the processor has no bfloat16 instructions"
)
def test_half_precision_attends_in_large_products_unless_told_not_to(tmp_path):
    by_torch, in_blocks = half_precision(tmp_path, "block_attention")
    records = next((tmp_path / "True" / "stages").iterdir()) / "stage.json"
    [blocks] = [each for each in read_json(records)["figures"]["speedups"] if each["name"] == "compute.block_attention"]
    assert blocks["saved"]["attentions of a sample by itself"] >= 3 * 4
    assert by_torch != in_blocks
    assert by_torch == pytest.approx(in_blocks, rel=1e-2)


def test_chunks_are_refused_by_name_where_nobody_has_looked_at_the_logits(tmp_path):
    model = llava_around("llama", tiny_processor())
    path = write_project(tmp_path, compute={"chunked_loss": True})
    args = arguments(tmp_path)
    assert plan_compute(Recipe.from_yaml(path), model, args, samples=1).chunked_loss is True

    class Other(type(model)):
        pass

    model.__class__ = Other
    with pytest.raises(RecipeError, match=r"compute.chunked_loss: what Other does to its logits was not tested"):
        plan_compute(Recipe.from_yaml(path), model, args, samples=1)


def arguments(folder, **options):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)


def test_auto_compiles_long_training_in_half_precision_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "sh")  # which is on every machine; nothing is compiled here
    model = llava_around("llama", tiny_processor())
    auto = Recipe.from_yaml(write_project(tmp_path))

    def why(recipe, samples=10**9, model=model, **options):
        return why_uncompiled(recipe, model, arguments(tmp_path, **options), samples=samples)

    assert why(auto, bf16=True) is None
    assert why(auto, bf16=True, samples=100) == "100 samples are too few for what compiling takes"
    assert why(auto) == "it pays in bfloat16 only"
    assert "checkpointing" in why(auto, bf16=True, activation_checkpointing=True)
    other = llava_around("granite", tiny_processor())
    assert why(auto, bf16=True, model=other) == "layers of type 'granite' were not tested with it"
    off, on = (Recipe.from_yaml(write_project(tmp_path, compute={"compile": switch})) for switch in (False, True))
    assert why(off, bf16=True) == "compute.compile is false"
    assert why(on, samples=1) is None
    with pytest.raises(RecipeError, match=r"compute.compile: layers of type 'granite' were not tested"):
        why(on, model=other)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_layers_give_the_losses_of_none(tmp_path, plain):
    losses, speedups = run(tmp_path, compile=True)
    assert losses == pytest.approx(plain[0], rel=1e-5)
    assert speedups["compute.compile"]["on"]
    assert speedups["compute.compile"]["saved"]["layers run one operation at a time"] == 2
