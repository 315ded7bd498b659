"""Every shipped recipe parses, says what it is for, and trains what its name promises."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from mmpeft.config.recipe import Recipe
from mmpeft.config.shipped import find_recipe, shipped_recipes
from tests.plain import PRELUDE

RUNS = [recipe for recipe in shipped_recipes() if not recipe.name.startswith("accelerate/")]

two_processes = """
from accelerate import PartialState
from transformers import TrainingArguments

arguments = TrainingArguments("out", use_cpu=True)
print(f"process {arguments.process_index} of {arguments.world_size} over {PartialState().backend}", flush=True)
PartialState().destroy_process_group()
"""


@pytest.mark.parametrize("shipped", RUNS, ids=lambda recipe: recipe.name)
def test_it_parses_and_survives_the_way_through_yaml(shipped, tmp_path):
    recipe = Recipe.from_yaml(shipped.path)
    assert recipe.data.eval is not None
    assert str(recipe.output).startswith("runs/")
    copy = tmp_path / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe.to_dict(), allow_unicode=True), encoding="utf-8")
    assert Recipe.from_yaml(copy) == recipe


@pytest.mark.parametrize("shipped", shipped_recipes(), ids=lambda recipe: recipe.name)
def test_its_first_line_describes_it_in_one_sentence(shipped):
    assert shipped.description.endswith(".")
    assert 20 < len(shipped.description) < 130


def test_each_run_writes_to_a_place_of_its_own():
    places = [Recipe.from_yaml(recipe.path).output for recipe in RUNS]
    assert len(set(places)) == len(places)


def test_what_the_llava_recipes_train():
    stages = {
        recipe.name: [
            {part: how if isinstance(how, str) else "lora" for part, how in stage.train.items()}
            for stage in Recipe.from_yaml(recipe.path).stages
        ]
        for recipe in RUNS
        if recipe.name.startswith("llava/")
    }
    projector = {"projector": "full"}
    assert stages == {
        "llava/two-stage": [projector, {"projector": "full", "language": "lora"}],
        "llava/projector": [projector],
        "llava/lora": [{"language": "lora"}],
        "llava/full-language": [projector, {"projector": "full", "language": "full"}],
        "llava/compose": [projector, {"vision": "lora", "projector": "full", "language": "lora"}],
    }


@pytest.mark.slow
def test_the_cpu_settings_of_accelerate_start_two_processes_over_gloo(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + two_processes)
    settings = find_recipe("accelerate/cpu_ddp").path
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", settings, script],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Not by lines: the processes share stdout and may write into each other's line.
    assert sorted(re.findall(r"process \d of \d over gloo", done.stdout)) == [
        "process 0 of 2 over gloo",
        "process 1 of 2 over gloo",
    ]
