"""A recipe of one stage for real runs that break off and go on, by one process or several.

22 samples in steps of 8, twice: the last step of an epoch has six, which four processes cannot share evenly. Two
samples of three are text alone. There is a checkpoint behind each second step.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import losses, run_recipe
from tests.project import TWO_STAGES, make_mostly_text, write_project

STAGES = [{**TWO_STAGES[1], "max_steps": None, "epochs": 2, "trainer": {"save_steps": 2}}]


def write_one_stage(folder: Path) -> Path:
    """The project; returns the recipe's path."""
    path = write_project(folder, stages=STAGES, batch={"size": 8})
    make_mostly_text(folder / "data" / "train.json")
    return path


def run_as(
    path: Path, name: str, strategy: str, processes: int, *overrides: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A run whose output is `name`, beside the recipe."""
    output, shared = f"output={path.parent / name}", f"stages.0.distributed={strategy}"
    return run_recipe(path, output, shared, f"processes={processes}", *overrides, env=env)


def assert_same(output: Path, expected: Path) -> None:
    """The same losses and the same adapter."""
    [ours], [theirs] = losses(output), losses(expected)
    assert ours == pytest.approx(theirs, rel=1e-4)
    weights, others = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (output, expected))
    assert weights.keys() == others.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-3, atol=1e-4)
