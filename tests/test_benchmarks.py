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


@pytest.mark.slow
def test_scale_counts_what_grows_with_processes(tmp_path):
    file = tmp_path / "found.json"
    done = run("benchmarks/scale.py", "--quick", "--results", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["started"][0]["processes"] == 2
    assert found["checkpoint"]["processes"] == 100
    assert found["computed"]["rng_mb_of_a_checkpoint"]["value"] > 100
    assert all(entry["formula"] for entry in found["computed"].values())


@pytest.mark.slow
def test_layers_are_gathered_while_others_compute(tmp_path):
    """In a trace of a real step of two processes; without asking for the next layer, none of it is."""
    file = tmp_path / "found.json"
    done = run("benchmarks/overlap.py", "--quick", "--results", file)
    assert done.returncode == 0, done.stderr
    rows = {row["case"]: row for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
    hidden = {name: row["hidden"] / row["sending"] for name, row in rows.items()}
    print(hidden)
    assert hidden["fsdp2"] > 0.05
    assert hidden["fsdp2, one by one"] < 0.01
    assert hidden["tower in full, ddp"] > 0.05
    assert rows["fsdp2"]["loss"] == rows["fsdp2, one by one"]["loss"]
