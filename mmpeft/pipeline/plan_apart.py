"""Plans of stages that several processes train, made by a process of its own before they do.

A rehearsal runs a stage's step by shape in one process; those of a run are set up to wait for each other. So the first
of them starts `mmpeft plan`, and tells the others what it found.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError

logger = logging.getLogger(__name__)

_LAUNCHERS = ("ACCELERATE_", "FSDP_", "GROUP_", "MASTER_", "ROLE_", "TORCHELASTIC_")
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def plan_apart(recipe: Recipe, processes: int) -> list[dict[str, Any]]:
    """The rows of `mmpeft plan --processes N` for stages whose `distributed` is settled.

    Raises:
        RecipeError: nothing was found, and the recipe cannot do without (`batch.tokens: auto`).
    """
    # LOCAL_WORLD_SIZE stays: by it a process knows how many take memory beside it.
    environment = {
        name: value for name, value in os.environ.items() if name not in _PLACE and not name.startswith(_LAUNCHERS)
    }
    with tempfile.TemporaryDirectory(prefix="mmpeft-plan-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
        words = [sys.executable, "-m", "mmpeft", "plan", str(path), "--processes", str(processes), "--json"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        rows: list[dict[str, Any]] = json.loads(done.stdout)["stages"]
        return rows
    said = " ".join(done.stderr.split())[-500:]
    if recipe.batch.tokens == "auto":
        raise RecipeError(f"batch.tokens: auto: a plan of {processes} processes failed: {said}; write a number")
    logger.warning("memory is not planned, for a plan of %d processes failed: %s", processes, said)
    return []
