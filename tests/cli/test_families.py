import json
import time

import pytest
from typer.testing import CliRunner

from mmpeft.cli import main
from mmpeft.families.catalogue import catalogue
from mmpeft.families.registry import FAMILIES


@pytest.fixture
def run():
    def invoke(*arguments):
        return CliRunner().invoke(main.app, ["families", *arguments])

    return invoke


def test_every_type_is_there_with_its_status(run):
    printed = json.loads(run("--json").stdout)
    families = {entry["model_type"]: entry for entry in printed["families"]}
    assert len(families) == len(catalogue()) >= 100
    assert families["llava"] == {
        "model_type": "llava",
        "status": "first class",
        "family": "llava",
        "tested": "picture step",
        "modalities": ["image"],
        "data": True,
        "parts": {
            "vision": {"modules": ["model.vision_tower"], "found": "stated"},
            "projector": {"modules": ["model.multi_modal_projector"], "found": "stated"},
            "language": {"modules": ["model.language_model", "lm_head"], "found": "stated"},
        },
        "note": families["llava"]["note"],
    }
    assert families["blip-2"]["parts"]["vision"] == {"modules": ["vision_model"], "found": "get_encoder"}
    assert (families["mistral4"]["status"], families["mistral4"]["tested"]) == ("generic", "text step")
    assert families["evolla"]["status"] == "not supported"
    assert families["evolla"]["note"].startswith("it takes proteins")


def test_first_class_is_what_the_registry_says(run):
    printed = json.loads(run("--json").stdout)["families"]
    stated = {entry["model_type"] for entry in printed if entry["status"] == "first class"}
    assert stated == {model_type for spec in FAMILIES for model_type in spec.model_types}


def test_the_table_for_people_gives_reasons_and_counts(run):
    result = run()
    assert result.exit_code == 0
    assert "qwen3_vl_moe" in result.stdout
    assert "pi0: it answers with a robot's actions, not with text" in result.stdout
    assert "5 not supported" in result.stdout


def test_one_type_is_shown_in_full(run):
    result = run("inkling2")
    assert "model.vision_tower.merger  (by the module's name)" in result.stdout
    assert "Give language.exclude_modules: [weight_proj]" in result.stdout


def test_a_type_that_is_not_there_is_named_with_its_nearest(run):
    result = run("qwen3_v")
    assert result.exit_code == 2
    assert "no model type 'qwen3_v'; did you mean 'qwen3_vl'?" in result.stderr


def test_no_model_is_built_to_print_them():
    started = time.perf_counter()
    catalogue()
    assert time.perf_counter() - started < 1
