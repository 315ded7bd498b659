"""A recipe from end to end: data, stages, evaluation, adapter, report."""

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from rich.console import Console

from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.config.train import PartTraining
from mmpeft.core.errors import OutputError, RecipeError
from mmpeft.core.files import ensure_directory, read_json, write_json, write_text
from mmpeft.core.memory import peak_memory_bytes
from mmpeft.core.types import Part
from mmpeft.export.card import render_card
from mmpeft.families.registry import family_of
from mmpeft.methods.checkpoint import copy_adapter
from mmpeft.models.devices import pick_device
from mmpeft.models.load import FACTS_NAME, load_model, load_processor
from mmpeft.pipeline.arguments import check_trainer_blocks
from mmpeft.pipeline.base import resolve_base, skeleton
from mmpeft.pipeline.cutting import measure
from mmpeft.pipeline.data import check_media, count_samples, describe_data, describe_sources, load_held_out, load_train
from mmpeft.pipeline.directory import RunDirectory, StageDirectory
from mmpeft.pipeline.evaluate import evaluate_with
from mmpeft.pipeline.facts import hardware, versions
from mmpeft.pipeline.inputs import base_hash, data_hash, evaluation_hash, stage_hash
from mmpeft.pipeline.plan import carry_forward, plan_stages
from mmpeft.pipeline.report import write_report
from mmpeft.pipeline.stage import StageStart, prepare_stage, run_stage

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a run has made.

    Attributes:
        output: its directory.
        result: `adapter/`; the last stage's model directory where it trained a tower `full`; of a run that
            stopped early (`until`), what its last stage wrote.
        report: report.html.
        stages: for each stage `{"name", "status": "trained" | "unchanged", "figures": {...}}`.
        scores: `{"before" | stage | "after": {metric: value}}`; empty without held-out data.
    """

    output: Path
    result: Path
    report: Path
    stages: tuple[Mapping[str, Any], ...]
    scores: Mapping[str, Mapping[str, float]]


def run(recipe: Recipe, *, resume: bool = True, until: str | None = None, console: Console | None = None) -> RunResult:
    """Run all stages of a recipe; what has not changed since the last run is not done again.

    Args:
        resume: go on from the last checkpoint of a stage that was stopped; False starts such a stage over.
        until: stop after the stage of this name.
        console: where progress is shown; default: nowhere.

    Raises:
        MMPeftError: of the recipe, the data, the model or the output; see its message.
        RunInterrupted: Ctrl-C; the same call goes on from the checkpoint.
    """
    state = _processes(recipe)
    quiet = console is None or not state.is_main_process
    session = _Run(recipe, console=Console(quiet=True) if quiet else console or Console())
    names = [stage.name for stage in recipe.stages]
    if until is not None and until not in names:
        raise RecipeError(f"no stage {until!r} in the recipe; it has: {', '.join(names)}")
    session.prepare()
    try:
        session.evaluate_base()
        for index, stage in enumerate(recipe.stages):
            session.advance(index, stage, resume=resume)
            if stage.name == until:
                break
        result = session.finish(whole=until in (None, names[-1]))
    except BaseException:
        # The report of a run that broke off; where even that cannot be written, its own error is the one to see.
        with contextlib.suppress(OutputError):
            session.record()
        raise
    session.record()
    return result


def _processes(recipe: Recipe) -> PartialState:
    """This process among the others, on the device that the recipe asks for."""
    device = pick_device(recipe.device)
    return PartialState(cpu=device.type == "cpu")


def plan(recipe: Recipe) -> list[dict[str, Any]]:
    """What each stage would train and for how many steps, as plan.json holds it; trains nothing.

    What a run has written in `output` stays as it is; only a model that the recipe composes is made there.

    Raises:
        MMPeftError: of the recipe, the data or the model, as `run` would raise it before training.
    """
    _processes(recipe)
    session = _Run(recipe, console=Console(quiet=True))
    session.prepare(write=False)
    return list(session.plan.values())


@dataclass
class _Position:
    """How far a run has come: what the next stage starts from."""

    base: str
    input_hash: str
    adapter: Path | None = None
    carried: dict[Part, PartTraining] = field(default_factory=dict)

    @property
    def result(self) -> Path:
        return self.adapter or Path(self.base)


class _Run:
    """One run of a recipe; each method is one act of it."""

    def __init__(self, recipe: Recipe, *, console: Console) -> None:
        self.recipe, self.console = recipe, console
        self.state = PartialState()
        self.directory = RunDirectory(recipe.output)
        self.begin, self.started = time.perf_counter(), datetime.datetime.now(datetime.UTC)
        self.stages: list[dict[str, Any]] = []
        self.evaluations: dict[str, Any] = {}
        self.last = "before"

    def prepare(self, *, write: bool = True) -> None:
        """Everything that can fail before anything is trained: output, base, data, plan."""
        recipe, directory = self.recipe, self.directory
        write = write and self.state.is_main_process
        if write:
            ensure_directory(directory.path)
            write_text(directory.recipe, yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
        identity = base_hash(recipe)
        base = resolve_base(recipe, directory.base_model, identity)
        self.position = _Position(base=base, input_hash=identity)
        self.processor = load_processor(
            base, max_pixels=recipe.data.max_pixels, trust_remote_code=recipe.trust_remote_code
        )
        with self.state.main_process_first():
            self.train = load_train(recipe, self.processor)
            self.eval = load_held_out(recipe, self.processor)
            measure(recipe, self.train)
        self.hashes = {id(data): data_hash(data) for data in (self.train, self.eval) if data is not None}
        samples = count_samples(self.train)
        check_trainer_blocks(recipe, samples)
        check_media(recipe, self.train)
        plan = plan_stages(recipe, base, samples, sources=describe_sources(self.train))
        if write:
            write_json(directory.plan, {"stages": plan})
            write_json(directory.data, describe_data(recipe, self.train, self.eval))
        self.plan = {row["name"]: row for row in plan}
        stored = read_json(directory.evaluation) if directory.evaluation.exists() else {}
        self.stored = stored
        self.state.wait_for_everyone()

    def evaluate_base(self) -> None:
        """Answers before anything is trained."""
        self._evaluate("before", None)

    def advance(self, index: int, stage: StageConfig, *, resume: bool) -> None:
        """Train one stage, or find that it is done, and evaluate what came out."""
        folder = self.directory.stage(index, stage.name)
        start = StageStart(base=self.position.base, adapter=self.position.adapter, carried=self.position.carried)
        input_hash = stage_hash(self.recipe, stage, data=self.hashes[id(self.train)], before=self.position.input_hash)
        found = folder.state
        unchanged = found.get("input_hash") == input_hash
        self.state.wait_for_everyone()
        model = None
        if unchanged and found.get("status") == "done" and (folder.adapter.exists() or folder.model.exists()):
            self.console.print(f"  {stage.name}: unchanged since it was trained")
            self.stages.append({"name": stage.name, "status": "unchanged", "figures": found.get("figures", {})})
        else:
            if found and not unchanged:
                self.console.print(f"  {stage.name}: its inputs are not those it was trained with; it is trained again")
            self._announce(stage)
            prepared = prepare_stage(self.recipe, stage, start, seed=self.recipe.seed + index)
            output = "adapter" if hasattr(prepared.model, "peft_config") else "model"
            run_stage(
                self.recipe,
                stage,
                prepared,
                self.train,
                self.eval,
                folder=folder,
                state={"name": stage.name, "index": index, "input_hash": input_hash, "output": output},
                resume=resume and unchanged,
                console=self.console,
            )
            model = prepared.model
            self.stages.append({"name": stage.name, "status": "trained", "figures": folder.state["figures"]})
        self._move_on(stage, folder, input_hash)
        self._evaluate(stage.name, model)
        self.last = stage.name

    def _announce(self, stage: StageConfig) -> None:
        row = self.plan[stage.name]
        parts = ", ".join(
            f"{name} {part['trainable']:,} weights at {part['learning_rate']:g}"
            for name, part in row["parts"].items()
            if part["trainable"]
        )
        self.console.print(
            f"[bold]{stage.name}[/bold]: {parts} · {row['steps']} steps of {row['batch']['size']} samples",
            soft_wrap=True,
        )

    def _move_on(self, stage: StageConfig, folder: StageDirectory, input_hash: str) -> None:
        position = self.position
        carried = carry_forward(position.carried, stage)
        if folder.adapter.exists():
            self.position = _Position(
                base=position.base, input_hash=input_hash, adapter=folder.adapter, carried=carried
            )
        else:
            self.position = _Position(base=str(folder.model.resolve()), input_hash=input_hash)

    def _evaluate(self, name: str, model: Any) -> None:
        """Answer the held-out questions unless the same model has answered the same ones already."""
        if self.eval is None:
            return
        wanted = evaluation_hash(self.recipe, data=self.hashes[id(self.eval)], model=self.position.input_hash)
        if self.stored.get(name, {}).get("input_hash") == wanted:
            self.evaluations[name] = self.stored[name]
            return
        if model is None:
            model, _ = load_model(
                self.position.base,
                adapter=str(self.position.adapter) if self.position.adapter else None,
                device=str(self.state.device),
                dtype=self.recipe.dtype,
                trust_remote_code=self.recipe.trust_remote_code,
            )
        with self.console.status(f"answering the held-out questions ({name}) …"):
            scores = evaluate_with(self.recipe.evaluate, model, self.processor, self.eval)
        self.evaluations[name] = {**scores, "input_hash": wanted}
        self._write_evaluations()
        figures = " · ".join(f"{metric} {value:.3f}" for metric, value in scores["metrics"].items())
        self.console.print(f"  held out, {name}: {figures} ({scores['seconds']:.0f} s)")

    def _write_evaluations(self) -> None:
        # Answers of later stages stay as long as nothing that they rest on was trained again.
        trained = any(stage["status"] == "trained" for stage in self.stages)
        entries = self.evaluations if trained else {**self.stored, **self.evaluations}
        if self.state.is_main_process and entries != self.stored:
            write_json(self.directory.evaluation, entries)

    def finish(self, *, whole: bool) -> RunResult:
        """The adapter under its final name, with its facts and card; of a run that stopped early, its stage's own."""
        if self.eval is not None:
            if whole:
                self.evaluations["after"] = self.evaluations[self.last]
            self._write_evaluations()
        result = self.position.result
        if whole and self.position.adapter is not None:
            result = self.directory.adapter
            facts = self._facts()
            current = result / FACTS_NAME
            if self.state.is_main_process and not (current.exists() and read_json(current) == facts):
                copy_adapter(self.position.adapter, result, facts=facts, card=render_card(facts))
        self.state.wait_for_everyone()
        return RunResult(
            output=self.directory.path,
            result=result,
            report=self.directory.path / "report.html",
            stages=tuple(self.stages),
            scores={name: entry["metrics"] for name, entry in self.evaluations.items()},
        )

    def _facts(self) -> dict[str, Any]:
        scored = {name: self.evaluations[name] for name in ("before", "after") if name in self.evaluations}
        base = self.position.base
        model = skeleton(base, trust_remote_code=self.recipe.trust_remote_code)
        local = Path(base).is_dir()
        return {
            "mmpeft_version": versions()["mmpeft"],
            "input_hash": self.position.input_hash,
            "base_model": base,
            # A run that was moved as a whole still finds its base.
            "base_model_relative": os.path.relpath(base, self.directory.adapter.resolve()) if local else None,
            "family": family_of(model).name,
            "recipe": self.recipe.to_dict(),
            "stages": [stage["name"] for stage in self.stages],
            "parts": self.plan[self.last]["parts"],
            "data": read_json(self.directory.data),
            "versions": versions(),
            "metrics": {name: entry["metrics"] for name, entry in scored.items()},
            "by_kind": {name: entry["by_kind"] for name, entry in scored.items()},
        }

    def record(self) -> None:
        """run.json and the report, of a run that ended or broke off."""
        if not self.state.is_main_process:
            return
        trained = any(stage["status"] == "trained" for stage in self.stages)
        if trained or not self.directory.facts.exists():
            write_json(
                self.directory.facts,
                {
                    "versions": versions(),
                    "device": self.state.device.type,
                    "processes": self.state.num_processes,
                    "hardware": hardware(self.state.device),
                    "started": self.started.isoformat(timespec="seconds"),
                    "seconds": time.perf_counter() - self.begin,
                    "peak_memory_bytes": peak_memory_bytes(self.state.device.type),
                },
            )
        write_report(self.directory.path)
