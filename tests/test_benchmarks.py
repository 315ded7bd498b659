"""The scripts of benchmarks/ run, on models so small that their figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llava", "qwen"])
def test_training_speed_compares_mmpeft_with_transformers_at_equal_losses(model, tmp_path):
    case = {"llava": "distinct-projector-llava-fp32", "qwen": "eight-lora-qwen-fp32"}[model]
    file = tmp_path / "found.json"
    done = run("benchmarks/training_speed.py", "--tiny", "--rounds", 1, "--case", case, "--results", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    epochs = [2, 2, 1, 1] if model == "llava" else [1, 1]
    assert [row["epochs"] for row in found["rows"]] == epochs
    assert {row["program"] for row in found["rows"]} == {"mmpeft", "transformers"}
    for row in found["rows"]:
        assert row["largest_difference_of_loss"] < 1e-4
        assert row["samples_per_second"] > 0
        assert 0 < row["share_of_matrix_product"] < 1
    assert found["hardware"]
    assert found["versions"]["torch"]
    table = file.with_suffix(".md").read_text(encoding="utf-8")
    assert table.count(f"| {case} |") == len(found["rows"])


@pytest.mark.slow
def test_training_speed_writes_nothing_where_the_maths_differs(tmp_path):
    # Half the learning rate: the same as long as no step has been taken, another one then.
    program = (
        "import sys, runpy; sys.path.insert(0, 'benchmarks'); sys.argv = ['x', *sys.argv[1:]]\n"
        "import workload.programs; workload.programs.LEARNING_RATE *= 0.5\n"
        "runpy.run_path('benchmarks/training_speed.py', run_name='__main__')"
    )
    file = tmp_path / "found.json"
    case = "distinct-projector-llava-fp32"
    done = run("-c", program, "--tiny", "--rounds", 1, "--case", case, "--results", file)
    assert done.returncode != 0
    assert "not the same maths, nothing is written" in done.stderr
    assert not file.exists()
