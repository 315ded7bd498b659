"""A recipe from end to end: data, stages, evaluation, adapter, report."""

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console

from mmpeft.config.device_table import DEVICES, THIS
from mmpeft.config.names import did_you_mean
from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.config.train import PartTraining
from mmpeft.core.errors import HubError, MMPeftError, OutputError, RecipeError
from mmpeft.core.files import ensure_directory, read_json, write_json, write_text
from mmpeft.core.forks import settle_before_forks
from mmpeft.core.memory import forget_peak, memory_in_use, peak_memory_bytes
from mmpeft.core.types import Part
from mmpeft.export.card import render_card
from mmpeft.export.hub import check_login
from mmpeft.export.sources import base_facts, weights_hashes
from mmpeft.families.registry import family_of
from mmpeft.methods.checkpoint import copy_adapter
from mmpeft.models.devices import pick_device
from mmpeft.models.load import BASE_WEIGHTS, FACTS_NAME, load_model, load_processor
from mmpeft.pipeline.arguments import check_trainer_blocks
from mmpeft.pipeline.base import quantization_of, resolve_base, skeleton
from mmpeft.pipeline.cutting import measure
from mmpeft.pipeline.data import check_media, count_samples, describe_data, describe_sources, load_held_out, load_train
from mmpeft.pipeline.device_settings import device_settings, repeatable, set_device
from mmpeft.pipeline.directory import RunDirectory, StageDirectory
from mmpeft.pipeline.evaluate import evaluate_with
from mmpeft.pipeline.facts import hardware, versions
from mmpeft.pipeline.inputs import base_hash, data_hash, evaluation_hash, stage_hash
from mmpeft.pipeline.origin import base_origins, machine, media_fingerprint
from mmpeft.pipeline.plan import (
    WORTH_APART,
    WORTH_REHEARSING,
    PlanInputs,
    carry_forward,
    plan_stages,
    planned_recipe,
    stage_recipe,
)
from mmpeft.pipeline.publish import push
from mmpeft.pipeline.relief import found_relief
from mmpeft.pipeline.report import write_report
from mmpeft.pipeline.stage import PlannedMemory, StageStart, prepare_stage, run_stage
from mmpeft.pipeline.strategy import evaluation_sharing, launcher_strategy, pick_strategy
from mmpeft.pipeline.waiting import without_hurry
from mmpeft.training.recompute import advising

logger = logging.getLogger(__name__)

ANSWER_ADVICE = (
    "memory does not suffice to answer the held-out questions: make evaluate.batch_size or evaluate.max_new_tokens "
    "smaller"
)


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
        published: address on the Hub, where the recipe names a repository and the run is whole.
    """

    output: Path
    result: Path
    report: Path
    stages: tuple[Mapping[str, Any], ...]
    scores: Mapping[str, Mapping[str, float]]
    published: str | None = None


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
    with repeatable(recipe.deterministic):
        return _run(recipe, resume=resume, until=until, console=console)


def _run(recipe: Recipe, *, resume: bool, until: str | None, console: Console | None) -> RunResult:
    state = join_processes(recipe)
    quiet = console is None or not state.is_main_process
    session = _Run(recipe, console=Console(quiet=True) if quiet else console or Console())
    names = [stage.name for stage in recipe.stages]
    if until is not None and until not in names:
        raise RecipeError(f"no stage {until!r} in the recipe; it has: {', '.join(names)}")
    session.prepare()
    try:
        session.evaluate_base()
        for index, stage in enumerate(session.recipe.stages):
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
    return replace(result, published=session.publish()) if until in (None, names[-1]) else result


def join_processes(recipe: Recipe) -> PartialState:
    """This process among the others, on the device that the recipe asks for."""
    settle_before_forks()
    launcher_strategy()  # Before accelerate reads it.
    device = pick_device(recipe.device)
    set_device(device, deterministic=recipe.deterministic)
    if device.type == "cpu":
        # DeepSpeed, where it is installed, looks for an accelerator when it is imported, and says that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return PartialState(cpu=device.type == "cpu")


def plan(
    recipe: Recipe, *, device: str = THIS, processes: int | None = None, speed: float | None = None
) -> list[dict[str, Any]]:
    """What each stage would train, for how many steps, in which memory and time, as plan.json holds it.

    Nothing is trained. What a run has written in `output` stays as it is; only a model that the recipe composes is made
    there.

    Args:
        device: a name of `mmpeft.config.device_table.DEVICES`, or `this`.
        processes: that share the work; default: one.
        speed: FLOP/s that training reaches; default: by the device.

    Raises:
        MMPeftError: of the recipe, the data or the model, as `run` would raise it before training.
    """
    join_processes(recipe)
    if device not in (THIS, *DEVICES):
        raise RecipeError(f"device {device!r} is not known{did_you_mean(device, [THIS, *DEVICES])}")
    session = _Run(recipe, console=Console(quiet=True))
    session.prepare(training=False, device=device, processes=processes, speed=speed)
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

    def prepare(
        self, *, training: bool = True, device: str = THIS, processes: int | None = None, speed: float | None = None
    ) -> None:
        """Everything that can fail before anything is trained: output, base, data, plan.

        Args:
            training: whether it will be; else nothing is written.
        """
        recipe, directory = self.recipe, self.directory
        if training and recipe.hub and self.state.is_main_process:
            check_login(recipe.hub.repo)
        write = training and self.state.is_main_process
        if write:
            ensure_directory(directory.path)
            write_text(directory.recipe, yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True))
        if training:
            directory.check_shared()
        identity = base_hash(recipe)
        base = resolve_base(recipe, directory.base_model, identity)
        if recipe.hub and recipe.hub.base_model is None and Path(base).is_dir():
            raise RecipeError(
                f"hub.base_model: missing; the base is a directory ({base}), so nobody else could load the adapter: "
                "give it a name on the Hub, OWNER/NAME"
            )
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
        check_trainer_blocks(recipe, samples, training=training)
        check_media(recipe, self.train)
        several = self.state.num_processes > 1
        inputs = PlanInputs(
            base=base,
            processor=self.processor,
            dataset=self.train,
            samples=samples,
            sources=describe_sources(self.train),
            device=device,
            processes=processes,
            speed=speed,
            # A run is not kept waiting for what it would not need, and several processes are not those of a rehearsal.
            least=(WORTH_APART if several else WORTH_REHEARSING) if training else 0.0,
            apart=several and training,
        )
        plan = plan_stages(recipe, inputs)
        if write:
            write_json(directory.plan, {"stages": plan})
            write_json(directory.data, describe_data(recipe, self.train, self.eval))
        self.plan = {row["name"]: row for row in plan}
        self.recipe = planned_recipe(recipe, plan)
        stored = read_json(directory.evaluation) if directory.evaluation.exists() else {}
        self.stored = stored
        self.state.wait_for_everyone()
        self.memory_before = memory_in_use(self.state.device.type)

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
            row = self.plan[stage.name]
            relief = found_relief(folder, self.recipe, stage, input_hash)
            recipe, stage = relief.applied(stage_recipe(self.recipe, row), stage)
            if relief.changes:
                self.console.print(
                    f"  {stage.name}: {folder.relief} has {' and '.join(relief.changes)}, for memory did not suffice"
                )
            alone = forget_peak(self.state.device.type)
            plan = row.get("memory")
            planned = None
            if plan and not relief.changes:
                planned = PlannedMemory(plan=plan, before=self.memory_before, alone=alone)
            prepared = prepare_stage(recipe, stage, start, seed=self.recipe.seed + index)
            output = "adapter" if hasattr(prepared.model, "peft_config") else "model"
            run_stage(
                recipe,
                stage,
                prepared,
                self.train,
                self.eval,
                folder=folder,
                state={"name": stage.name, "index": index, "input_hash": input_hash, "output": output},
                resume=resume and unchanged,
                console=self.console,
                relief=relief,
                memory=planned,
            )
            # Where it is spread over processes, what was written is loaded to answer.
            model = None if pick_strategy(stage).shares_weights else prepared.model
            del prepared
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
        if found := row.get("distributed"):
            self.console.print(f"  shared as {stage.distributed.describe()}: {found['why']}", soft_wrap=True)

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
                sharing=evaluation_sharing(self.recipe, self.position.base),
                quantization=quantization_of(self.recipe),
            )
        status = self.console.status(f"answering the held-out questions ({name}) …")
        with status, advising(ANSWER_ADVICE):
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
            current = result / FACTS_NAME
            written = read_json(current) if current.exists() else {}
            facts = self._facts(written)
            if self.state.is_main_process and written != facts:
                copy_adapter(self.position.adapter, result, facts=facts, card=render_card(facts))
        self.state.wait_for_everyone()
        return RunResult(
            output=self.directory.path,
            result=result,
            report=self.directory.path / "report.html",
            stages=tuple(self.stages),
            scores={name: entry["metrics"] for name, entry in self.evaluations.items()},
        )

    def _facts(self, written: Mapping[str, Any]) -> dict[str, Any]:
        same = written.get("input_hash") == self.position.input_hash and {"base", "media", "machine"} <= set(written)
        scored = {name: self.evaluations[name] for name in ("before", "after") if name in self.evaluations}
        base = self.position.base
        model = skeleton(base, trust_remote_code=self.recipe.trust_remote_code)
        local = Path(base).is_dir()
        origins = written["base"] if same else base_origins(self.recipe)
        recorded = written.get(BASE_WEIGHTS) if same else None
        # What the run composed, or a stage trained in full.
        made = local and not any(Path(origin["name"]).resolve() == Path(base).resolve() for origin in origins)
        return {
            "mmpeft_version": versions()["mmpeft"],
            "input_hash": self.position.input_hash,
            "base_model": base,
            # A run that was moved as a whole still finds its base.
            "base_model_relative": os.path.relpath(base, self.directory.adapter.resolve()) if local else None,
            **base_facts(base),
            "family": family_of(model).name,
            "recipe": self.recipe.to_dict(),
            "stages": [stage["name"] for stage in self.stages],
            "parts": self.plan[self.last]["parts"],
            "data": read_json(self.directory.data),
            "base": origins,
            **({BASE_WEIGHTS: recorded or weights_hashes(Path(base))} if made else {}),
            "media": written["media"]
            if same
            else {"train": media_fingerprint(self.train), "eval": media_fingerprint(self.eval)},
            "machine": written["machine"] if same else machine(self.state),
            "versions": versions(),
            "metrics": {name: entry["metrics"] for name, entry in scored.items()},
            "by_kind": {name: entry["by_kind"] for name, entry in scored.items()},
        }

    def publish(self) -> str | None:
        """Push the result to where the recipe says; its address.

        Raises:
            HubError: the Hub does not take it; the run is whole all the same.
        """
        hub = self.recipe.hub
        if hub is None:
            return None
        with without_hurry():
            if not self.state.is_main_process:
                return None
            try:
                pushed = push(
                    self.directory.path, hub.repo, private=hub.private, base_model=hub.base_model, license=hub.license
                )
            except MMPeftError as error:
                raise HubError(f"the run is done, but not pushed: {error}") from error
            return pushed.url

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
                    "settings": device_settings(self.state.device, deterministic=self.recipe.deterministic),
                    "deterministic": torch.are_deterministic_algorithms_enabled(),
                    "started": self.started.isoformat(timespec="seconds"),
                    "seconds": time.perf_counter() - self.begin,
                    "peak_memory_bytes": peak_memory_bytes(self.state.device.type),
                },
            )
        write_report(self.directory.path)
