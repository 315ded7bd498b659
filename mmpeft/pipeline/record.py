"""What a run has written so far, read without taking any of it for granted: runs stop, files go."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mmpeft.core.errors import OutputError
from mmpeft.core.files import read_json
from mmpeft.models.load import FACTS_NAME
from mmpeft.pipeline.directory import RunDirectory, StageDirectory
from mmpeft.training.callbacks import read_metrics

_HOLDS = {
    "recipe.yaml": "the recipe",
    "plan.json": "what was to be trained",
    "data.json": "files, fingerprints and skipped samples",
    "evaluation.json": "held-out answers and scores",
    "run.json": "versions, hardware and duration",
}


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage, as far as it came.

    Attributes:
        status: that of stage.json, or "not started".
        figures, plan: the `figures` of stage.json and the stage's row of plan.json; empty where absent.
        metrics: the rows of metrics.jsonl.
    """

    name: str
    status: str
    output: str | None
    resumed_from: int | None
    figures: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> int:
        """Steps that the stage takes by its plan; else those it has taken."""
        taken = self.metrics[-1]["step"] if self.metrics else 0
        return max(int(self.plan.get("steps") or 0), int(taken))


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run directory's content; what is absent is empty here and named in `notes`."""

    path: Path
    recipe: str
    stages: Sequence[StageRecord]
    evaluation: Mapping[str, Any]
    data: Mapping[str, Any]
    facts: Mapping[str, Any]
    adapter: Mapping[str, Any]
    result: Path | None
    notes: Sequence[str]

    @property
    def settings(self) -> Mapping[str, Any]:
        """The recipe's content; empty where it cannot be parsed."""
        try:
            value = yaml.safe_load(self.recipe)
        except yaml.YAMLError:
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def evaluations(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Pairs (name, evaluation) in the order in which they were made; "after" only if no stage stands for it."""
        names = [name for name in self.evaluation if name not in ("before", "after")]
        order = [*(["before"] if "before" in self.evaluation else []), *self._by_stage(names)]
        if "after" in self.evaluation and not names:
            order.append("after")
        return [(name, self.evaluation[name]) for name in order if isinstance(self.evaluation[name], dict)]

    def _by_stage(self, names: Sequence[str]) -> list[str]:
        order = [stage.name for stage in self.stages]
        return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def read_run(path: Path) -> RunRecord:
    """Everything that `path`, a run directory, holds.

    Raises:
        OutputError: there is no such directory.
    """
    if not path.is_dir():
        raise OutputError(f"{path}: no such run directory; expected the `output` of a recipe that was run")
    directory = RunDirectory(path)
    notes: list[str] = []
    recipe = directory.recipe.read_text(encoding="utf-8", errors="replace") if directory.recipe.is_file() else ""
    if not recipe:
        notes.append(_absent("recipe.yaml"))
    plan = _read(directory.plan, notes)
    data = _read(directory.data, notes)
    evaluation = _read(directory.evaluation, [] if data and not data.get("eval") else notes)
    if data and not data.get("eval"):
        notes.append("The recipe names no held-out data (data.eval), so no question was asked and nothing scored.")
    facts = _read(directory.facts, notes)
    stages = _stages(directory, plan)
    result = _result(directory, stages)
    if result is None:
        notes.append("There is no adapter yet: it is written when the last stage is done.")
    notes += [note for stage in stages for note in _stage_notes(stage)]
    return RunRecord(
        path=path,
        recipe=recipe,
        stages=stages,
        evaluation=evaluation,
        data=data,
        facts=facts,
        adapter=_read(directory.adapter / FACTS_NAME, []),
        result=result,
        notes=[*notes, *_data_notes(data)],
    )


def _absent(name: str) -> str:
    return f"{name} is not there, so this report lacks {_HOLDS[name]}."


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = read_json(path)
    except FileNotFoundError:
        notes.append(_absent(path.name) if path.name in _HOLDS else f"{path.name} is not there.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} cannot be read: found a {type(value).__name__}, expected an object.")
        return {}
    return value


def _stages(directory: RunDirectory, plan: Mapping[str, Any]) -> list[StageRecord]:
    """Those of the plan; without one, those that have a folder."""
    rows = [row for row in plan.get("stages") or [] if isinstance(row, dict) and row.get("name")]
    if rows:
        return [_stage(directory.stage(index, row["name"]), row["name"], row) for index, row in enumerate(rows)]
    folders = sorted(path for path in (directory.path / "stages").glob("[0-9]*-*") if path.is_dir())
    return [_stage(StageDirectory(path), path.name.partition("-")[2], {}) for path in folders]


def _stage(folder: StageDirectory, name: str, plan: Mapping[str, Any]) -> StageRecord:
    state = _read(folder.path / "stage.json", [])
    return StageRecord(
        name=name,
        status=state.get("status") or "not started",
        output=state.get("output"),
        resumed_from=state.get("resumed_from"),
        figures=state.get("figures") or {},
        plan=plan,
        metrics=[row for row in read_metrics(folder.metrics) if isinstance(row, dict) and {"step", "loss"} <= set(row)],
    )


def _result(directory: RunDirectory, stages: Sequence[StageRecord]) -> Path | None:
    """The adapter; or the model of a last stage that trained a tower in full."""
    if stages and stages[-1].status == "done" and stages[-1].output == "model":
        return directory.stage(len(stages) - 1, stages[-1].name).model
    return directory.adapter if directory.adapter.is_dir() else None


def _stage_notes(stage: StageRecord) -> list[str]:
    taken = stage.metrics[-1]["step"] if stage.metrics else 0
    where = f"step {taken} of {stage.steps}" if stage.steps else "its first step"
    said = {
        "not started": f"Stage {stage.name} had not started when this report was written.",
        "running": f"Stage {stage.name} had not ended ({where}) when this report was written.",
        "interrupted": f"Stage {stage.name} was interrupted after {where}; the same command goes on from there.",
        "failed": f"Stage {stage.name} failed after {where}.",
    }
    notes = [said[stage.status]] if stage.status in said else []
    if stage.resumed_from:
        notes.append(f"Stage {stage.name} was resumed from the checkpoint of step {stage.resumed_from}.")
    if skipped := len(stage.figures.get("skipped") or []):
        notes.append(f"Stage {stage.name}: {skipped} samples were skipped as they came; stage.json lists each.")
    bad = [row["step"] for row in stage.metrics if not is_finite(row.get("loss"))]
    if bad:
        notes.append(f"Stage {stage.name}: the loss was not a finite number at {len(bad)} steps, first {bad[0]}.")
    return notes


def _data_notes(data: Mapping[str, Any]) -> list[str]:
    notes = []
    for name, label in (("train", "training"), ("eval", "held-out")):
        entry = data.get(name) or {}
        if entry.get("streaming"):
            notes.append(f"The {label} samples were read as they were needed; how many there are was not counted.")
        if skipped := len(entry.get("skipped") or []):
            notes.append(f"{skipped} {label} samples were skipped; each is listed under Data with the reason.")
        if truncated := entry.get("truncated"):
            notes.append(f"{truncated} {label} samples are longer than max_length and were cut at their end.")
    return notes


def is_finite(value: Any) -> bool:
    """Whether this is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
