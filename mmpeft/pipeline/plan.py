"""What a recipe will do, worked out before anything runs."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import PartialState

from mmpeft.config.device_table import DEVICES, THIS
from mmpeft.config.distributed import DistributedConfig
from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.config.train import PartTraining
from mmpeft.core.memory import total_memory
from mmpeft.core.types import Part
from mmpeft.data.stream_mixture import Stream
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import check_carried, trains_tower
from mmpeft.methods.checkpoint import saved_as
from mmpeft.methods.plan import base_name, describe_training
from mmpeft.models.devices import measured_speed
from mmpeft.pipeline.arguments import Batch, count_steps, data_processes, learning_rates, plan_batch
from mmpeft.pipeline.compute import SAMPLE_TOKENS
from mmpeft.pipeline.data import TrainData
from mmpeft.pipeline.memory_plan import UTILISATION, Held, MemoryPlan, changes, shared
from mmpeft.pipeline.plan_apart import plan_apart
from mmpeft.pipeline.planning import ROOM, Given, fitting_tokens, held, model_of, plan_memory, room_here
from mmpeft.pipeline.sharing_plan import is_open, pick_sharing
from mmpeft.pipeline.strategy import pick_strategy, told
from mmpeft.training.main_process import on_main

logger = logging.getLogger(__name__)


def carry_forward(carried: dict[Part, PartTraining], stage: StageConfig) -> dict[Part, PartTraining]:
    """How the parts of the adapter after a stage were trained, given those of the adapter before it."""
    if trains_tower(stage.train):
        return {}
    return {**carried, **{part: saved_as(training) for part, training in stage.train.items() if training != "frozen"}}


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """What plans are made from.

    Attributes:
        base: model directory or hub id.
        samples: of an epoch; None where that is not known.
        sources: of a mixture, each with `name`, `weight`, `samples` and `shown`.
        device: a name of `DEVICES`, or `this`: where `fits` looks.
        processes: that share a stage's work; default: those at hand.
        speed: FLOP/s that training reaches; default: of the device's products the usual share, on a CPU measured.
        least: FLOP of a stage below which memory and time are not worked out.
        apart: whether a process of its own does that, and finds budgets of tokens, as several that train together need.
    """

    base: str
    processor: Any
    dataset: TrainData
    samples: int | None
    sources: Sequence[Mapping[str, Any]] = ()
    device: str = THIS
    processes: int | None = None
    speed: float | None = None
    least: float = 0.0
    apart: bool = False


WORTH_REHEARSING = 1e13
"""FLOP of a stage from which a run plans its memory before it trains: half a minute on a CPU, of which a rehearsal
takes a few seconds."""

WORTH_APART = 10 * WORTH_REHEARSING
"""The same where another process has to be started for it."""


def plan_stages(recipe: Recipe, inputs: PlanInputs) -> list[dict[str, Any]]:
    """For each stage its samples, steps, batch, memory and the table of parts, as plan.json holds them.

    Raises:
        RecipeError: a stage's `train` block does not fit the model, or the batch the processes.
    """
    processes = inputs.processes or PartialState().num_processes
    carried: dict[Part, PartTraining] = {}
    rows: list[dict[str, Any]] = []
    worth = recipe.batch.tokens == "auto"
    for stage in recipe.stages:
        check_carried(stage.train, carried)
        batch = plan_batch(recipe, data_processes(stage, processes))
        given = Given(
            recipe=recipe,
            stage=stage,
            base=inputs.base,
            processor=inputs.processor,
            dataset=inputs.dataset,
            carried=carried,
            samples=inputs.samples,
            batch=batch,
        )
        sharing: dict[str, Any] = {}
        if is_open(stage, processes):
            strategy, why = pick_sharing(given, processes, DEVICES.get(inputs.device))
            stage = stage.model_copy(update={"distributed": strategy})
            batch = plan_batch(recipe, data_processes(stage, processes))
            given = replace(given, stage=stage, batch=batch)
            sharing = {"distributed": {"name": strategy.describe(), "as": strategy.model_dump(), "why": why}}
        model, dtype = model_of(given)
        own = replace(held(model, dtype), quantized=recipe.quantization != "none")
        steps = count_steps(stage, inputs.samples, batch.size)
        given, automatic = (given, {}) if inputs.apart else _with_budget(given, inputs, own)
        planned = _about(model, steps, batch) >= inputs.least
        worth = worth or planned
        rows.append(
            {
                "name": stage.name,
                "samples": inputs.samples,
                **({"sources": list(inputs.sources)} if inputs.sources else {}),
                "steps": steps,
                "epochs": stage.epochs,
                "batch": {**asdict(given.batch), "together": _together(stage, processes), **automatic},
                "parts": describe_training(model, stage.train, learning_rates(stage)).to_dict(),
                **sharing,
                **(_memory_and_time(given, inputs, model, own, steps) if planned and not inputs.apart else {}),
            }
        )
        carried = carry_forward(carried, stage)
    if inputs.apart and worth:
        settled = planned_recipe(recipe, rows)
        stages = [stage.model_copy(update={"distributed": pick_strategy(stage)}) for stage in settled.stages]
        settled = settled.model_copy(update={"stages": type(settled.stages)(stages)})
        for row, found in zip(rows, on_main(lambda: plan_apart(settled, processes)) or rows, strict=True):
            row.update({name: found[name] for name in ("batch", "memory", "work") if name in found})
    return rows


def _together(stage: StageConfig, processes: int) -> int:
    return 1 if processes == 1 else told(stage).together


def _about(model: Any, steps: int, batch: Batch) -> float:
    """FLOP of a stage, roughly: of samples as long as many are."""
    return 6.0 * sum(weight.numel() for weight in model.parameters()) * SAMPLE_TOKENS * steps * batch.size


def stage_recipe(recipe: Recipe, row: Mapping[str, Any]) -> Recipe:
    """The recipe that a stage runs by: with the budget of tokens that its plan found, where the recipe left it open."""
    if recipe.batch.tokens != "auto":
        return recipe
    return recipe.model_copy(update={"batch": recipe.batch.model_copy(update={"tokens": row["batch"]["tokens"]})})


def planned_recipe(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> Recipe:
    """The recipe with what its plan found for stages whose `distributed` is `auto`."""
    stages = []
    for stage, row in zip(recipe.stages, rows, strict=True):
        found = row.get("distributed")
        chosen = {"distributed": DistributedConfig.model_validate(found["as"])} if found else {}
        stages.append(stage.model_copy(update=chosen))
    return recipe.model_copy(update={"stages": type(recipe.stages)(stages)})


def _with_budget(given: Given, inputs: PlanInputs, own: Held) -> tuple[Given, dict[str, Any]]:
    """A stage with its budget of tokens, and how it was found where the recipe says `auto`."""
    if given.recipe.batch.tokens != "auto":
        return given, {}
    facts = DEVICES.get(inputs.device)
    processes = inputs.processes or PartialState().num_processes
    room = room_here(processes) if facts is None else round(ROOM * (facts.memory - facts.overhead))
    tokens, why = fitting_tokens(given, own, room=room, processes=processes)
    logger.info("stage %s: batch.tokens: auto is %d; %s", given.stage.name, tokens, why)
    batch = replace(given.batch, tokens=tokens)
    recipe = stage_recipe(given.recipe, {"batch": {"tokens": tokens}})
    return replace(given, recipe=recipe, batch=batch), {"tokens_auto": why}


def _memory_and_time(given: Given, inputs: PlanInputs, model: Any, own: Held, steps: int) -> dict[str, Any]:
    facts = DEVICES.get(inputs.device)
    kind = PartialState().device.type
    plan = plan_memory(given, overhead=None if facts is None else facts.overhead)
    strategy = given.stage.distributed
    mine = shared(plan, strategy, given.batch.processes * strategy.together, own)
    room = total_memory(kind) if facts is None else facts.memory
    memory = {**mine.to_dict(), "device": inputs.device, "room": room, "fits": mine.peak <= room}
    if not memory["fits"]:
        found = changes(mine, room, checkpointed=_checkpointed(given, plan), towers=_towers(model), held=own)
        memory["changes"] = [asdict(change) for change in found]
    memory["devices"] = {
        name: {
            "title": each.title,
            "peak": mine.growth + each.overhead,
            "fits": mine.growth + each.overhead <= each.memory,
        }
        for name, each in DEVICES.items()
    }
    return {"memory": memory, "work": _work(given, inputs, plan, steps)}


def _checkpointed(given: Given, plan: MemoryPlan) -> MemoryPlan | None:
    """The same with activation checkpointing; None where it is on, or not to be rehearsed."""
    compute = given.recipe.compute
    asked = given.stage.trainer.get("activation_checkpointing") or given.stage.trainer.get("gradient_checkpointing")
    if compute.checkpointing is True or asked or plan.how != "rehearsed":
        return None
    changed = given.recipe.model_copy(update={"compute": compute.model_copy(update={"checkpointing": True})})
    found = plan_memory(replace(given, recipe=changed), overhead=plan.overhead)
    return found if found.how == "rehearsed" else None


def _towers(model: Any) -> int:
    """Bytes of towers that are frozen."""
    spec = family_of(model)
    return sum(
        weight.nbytes
        for name, weight in model.named_parameters()
        if spec.part_of(base_name(name)) in ("vision", "audio") and not weight.requires_grad
    )


def _work(given: Given, inputs: PlanInputs, plan: MemoryPlan, steps: int) -> dict[str, Any]:
    """Floating-point operations of a stage, and the time that they take."""
    dataset: Any = given.dataset
    if isinstance(dataset, Stream):
        share = given.batch.size / max(1, plan.samples)
    else:
        mean = float(dataset.lengths(0)["tokens"].mean())
        share = mean * given.batch.size / max(1, plan.tokens)
    # Processes that run the same samples are one among `processes`, and each has its share of the work.
    degree = given.stage.distributed.together
    flop = plan.flop * share * steps * degree
    facts = DEVICES.get(inputs.device)
    speed, how = inputs.speed, "given"
    if speed is None and facts is not None:
        half = given.recipe.dtype != "float32"
        speed, how = UTILISATION * ((facts.flops if half else facts.flops32) or 0), f"{UTILISATION:.0%} of its products"
    elif speed is None:
        speed, how = measured_speed(PartialState().device), "measured matrix products in float32"
    return {
        "flop": round(flop),
        "flops": speed,
        "flops_how": how,
        "seconds": flop / speed / (given.batch.processes * degree) if speed else None,
    }
