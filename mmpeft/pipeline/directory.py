"""What a run writes, and where: the one place that knows the names."""

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from mmpeft.core.errors import RecipeError
from mmpeft.core.files import read_json, write_json
from mmpeft.training.main_process import on_main


@dataclass(frozen=True)
class StageDirectory:
    """`stages/NN-name/` of a run."""

    path: Path

    @property
    def adapter(self) -> Path:
        """The adapter that this stage wrote."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The model that a stage with a tower `full` wrote."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The Trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def relief(self) -> Path:
        """What the stage does otherwise than its recipe says, for memory did not suffice."""
        return self.path / "relief.json"

    @property
    def metrics(self) -> Path:
        """One line of JSON a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def state(self) -> dict[str, Any]:
        """`stage.json`; empty where there is none yet."""
        file = self.path / "stage.json"
        return read_json(file) if file.exists() else {}

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace `stage.json`."""
        write_json(self.path / "stage.json", state)


@dataclass(frozen=True)
class RunDirectory:
    """The `output` of a recipe."""

    path: Path

    def check_shared(self) -> None:
        """Refuse a directory that processes on other machines do not see; each process has to ask.

        Raises:
            RecipeError: names the machines that do not.
        """
        state = PartialState()
        if state.num_processes == 1:
            return
        # A name that nobody has looked for yet: network file systems remember what was not there.
        mark = self.path / on_main(lambda: f".seen-{uuid.uuid4().hex}")
        on_main(mark.touch)
        blind = gather_object([] if os.path.isfile(mark) else [socket.gethostname()])
        if state.is_main_process:
            mark.unlink()
        if blind:
            raise RecipeError(
                f"output: {self.path} on {', '.join(sorted(set(blind)))} is not the directory that the first process "
                "writes; give one on a file system that all machines share"
            )

    def stage(self, index: int, name: str) -> StageDirectory:
        """The directory of a stage; `index` counts from 0, its name from 01."""
        return StageDirectory(self.path / "stages" / f"{index + 1:02d}-{name}")

    @property
    def recipe(self) -> Path:
        """The recipe as resolved."""
        return self.path / "recipe.yaml"

    @property
    def base_model(self) -> Path:
        """The model that the recipe composed; absent where it names one."""
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        """The result."""
        return self.path / "adapter"

    @property
    def plan(self) -> Path:
        """What each stage trains, for how many steps."""
        return self.path / "plan.json"

    @property
    def data(self) -> Path:
        """Files, fingerprints, and every sample that was left out or cut."""
        return self.path / "data.json"

    @property
    def evaluation(self) -> Path:
        """Scores and answers, before and after each stage."""
        return self.path / "evaluation.json"

    @property
    def facts(self) -> Path:
        """Versions, hardware and duration."""
        return self.path / "run.json"
