"""Real runs in processes of their own: by `mmpeft run` itself, or by another launcher."""

import json as json_module
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpeft.config.shipped import find_recipe
from mmpeft.core.files import read_json
from mmpeft.training.callbacks import read_metrics

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def accelerate(settings: str) -> tuple[str, ...]:
    """The words of `accelerate launch` with settings that come with mmpeft, such as "cpu_zero2"."""
    return ("-m", "accelerate.commands.launch", "--config_file", str(find_recipe(f"accelerate/{settings}").path))


def environment(**changes: str) -> dict[str, str]:
    """That of a user: none of the settings that tests have for themselves."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "DS_"))}
    return own | {"OMP_NUM_THREADS": "1"} | changes


def injected(folder: Path, code: str) -> dict[str, str]:
    """The environment in which each Python process runs this code when it begins."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def command(path: Path, *overrides: str, launcher: Sequence[str] = (), json: bool = False) -> list[str]:
    """The words that run a recipe; `overrides` are `key=value`."""
    changes = [word for override in overrides for word in ("--set", override)]
    return [sys.executable, *launcher, "-m", "mmpeft", "run", str(path), *changes, *(["--json"] if json else [])]


def run_recipe(
    path: Path,
    *overrides: str,
    launcher: Sequence[str] = (),
    json: bool = False,
    env: Mapping[str, str] | None = None,
    timeout: int = 500,
) -> subprocess.CompletedProcess[str]:
    """A run, ended or not."""
    return subprocess.run(
        command(path, *overrides, launcher=launcher, json=json),
        cwd=path.parent,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def losses(output: Path) -> list[list[float]]:
    """Of each stage, step by step."""
    stages = sorted((output / "stages").iterdir())
    return [[row["loss"] for row in read_metrics(stage / "metrics.jsonl") if "loss" in row] for stage in stages]


def figures(output: Path) -> list[dict]:
    """Of each stage, what stage.json has."""
    return [read_json(stage / "stage.json")["figures"] for stage in sorted((output / "stages").iterdir())]


def can_mount() -> bool:
    """Whether a test may make a file system of its own."""
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    try:
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def rows_of_two(text: str, folder: Path, *words: str) -> list[dict[str, Any]]:
    """What a script prints as JSON objects, a line each, on two processes over gloo."""
    script = folder / "passing.py"
    script.write_text(text, encoding="utf-8")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(script), *words],
        cwd=root,
        env=environment(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json_module.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
