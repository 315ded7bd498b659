"""One stage from its inputs to its adapter (or model) on disk."""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from mmpeft.config.distributed import SHARED_OUT, ZERO
from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.config.train import PartTraining
from mmpeft.core.errors import OutputError, RunInterrupted
from mmpeft.core.memory import latest_peak_bytes, peak_memory_bytes, returning_memory
from mmpeft.core.speed import Speedup
from mmpeft.core.types import Part
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.dataset import MultimodalDataset
from mmpeft.data.packing import PackedCollator
from mmpeft.methods.attach import get_peft_model, trains_tower
from mmpeft.methods.checkpoint import (
    InitialLora,
    carry_over,
    initial_lora,
    remove_directory,
    save_adapter,
    save_model,
)
from mmpeft.methods.plan import TrainingPlan, describe_training
from mmpeft.models.load import load_model
from mmpeft.models.sharded import is_sharded, place_whole
from mmpeft.models.tensor_parallel import share_adapters
from mmpeft.pipeline.arguments import (
    Batch,
    count_steps,
    data_processes,
    learning_rates,
    plan_batch,
    training_arguments,
)
from mmpeft.pipeline.base import quantization_of
from mmpeft.pipeline.compute import compute_speedups, plan_compute, supervised_only
from mmpeft.pipeline.cutting import cost_model, cut_batch, cut_speedups, plan_cut
from mmpeft.pipeline.data import TrainData, count_samples
from mmpeft.pipeline.directory import StageDirectory
from mmpeft.pipeline.features import feature_speedup, keep_features
from mmpeft.pipeline.memory_plan import compared
from mmpeft.pipeline.packing import packing_obstacle, packing_speedups, packs_rows
from mmpeft.pipeline.relief import Attempt, Relief
from mmpeft.pipeline.strategy import forget_strategy, loading, pick_strategy
from mmpeft.pipeline.tokens import KeptTokens
from mmpeft.pipeline.workers import set_workers, worker_speedup
from mmpeft.training.callbacks import MetricsFile, StopOnInterrupt
from mmpeft.training.main_process import on_main
from mmpeft.training.progress import ProgressDisplay
from mmpeft.training.recompute import advising
from mmpeft.training.resume import check_writers, last_checkpoint
from mmpeft.training.shares import adapter_parameters, gathered, keep_whole
from mmpeft.training.trainer import MultimodalTrainer

logger = logging.getLogger(__name__)

UPDATE_ADVICE = (
    "memory does not suffice for an update: use trainer: {optim: adamw_bnb_8bit}, distributed: {strategy: zero2, "
    "offload: optimizer}, or a LoRA of smaller r; `mmpeft plan` says what each would save"
)


@dataclass(frozen=True, kw_only=True)
class StageStart:
    """What a stage starts from.

    Attributes:
        base: model directory or hub id.
        adapter: adapter of the stage before, on the same base; None for the first.
        carried: how earlier stages trained each part of that adapter.
    """

    base: str
    adapter: Path | None = None
    carried: Mapping[Part, PartTraining]


@dataclass(frozen=True, kw_only=True)
class PreparedStage:
    """A model ready to train.

    Attributes:
        model: a `PeftModel`, or a plain model whose tower trains `full`.
        dtype: of the base weights.
        initial: LoRA matrices before training, where their initialisation changed the base.
    """

    model: Any
    processor: Any
    plan: TrainingPlan
    dtype: torch.dtype
    initial: InitialLora | None


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """What a stage's memory is compared with when it has run.

    Attributes:
        plan: the stage's `memory` of plan.json.
        before: bytes that the process had before the run's first model.
        alone: whether the peak was forgotten when the stage began.
    """

    plan: Mapping[str, Any]
    before: int
    alone: bool

    def compare(self, device_type: str) -> dict[str, Any]:
        """Planned against measured, as stage.json holds it."""
        peak = latest_peak_bytes(device_type)
        return compared(self.plan, peak=peak, before=self.before, exact=self.alone)


def prepare_stage(recipe: Recipe, stage: StageConfig, start: StageStart, *, seed: int) -> PreparedStage:
    """Load the base, carry the stage before over, and attach what this stage trains.

    Raises:
        RecipeError, AdapterError, ModelError: what the recipe asks does not fit the model.
    """
    strategy = pick_strategy(stage)
    with loading(strategy, recipe, start.base) as sharing:
        model, processor = load_model(
            start.base,
            device=str(PartialState().device),
            dtype=recipe.dtype,
            max_pixels=recipe.data.max_pixels,
            trust_remote_code=recipe.trust_remote_code,
            sharing=sharing,
            quantization=quantization_of(recipe),
        )
    base_dtype = model.dtype
    if start.adapter is not None and trains_tower(stage.train):
        model = PeftModel.from_pretrained(model, str(start.adapter)).merge_and_unload()
    set_seed(seed)
    prepared = get_peft_model(model, stage.train, carried=start.carried)
    if start.adapter is not None and isinstance(prepared, PeftModel):
        carry_over(prepared, start.adapter)
    if strategy.strategy == "zero3":
        keep_whole(prepared)
    if is_sharded(prepared):
        # PEFT puts an adapter beside the weight that it is for, which may wait in host memory.
        place_whole(prepared, PartialState().device)
    share_adapters(prepared)
    return PreparedStage(
        model=prepared,
        processor=processor,
        plan=describe_training(prepared, stage.train, learning_rates(stage)),
        dtype=base_dtype,
        initial=initial_lora(prepared) if isinstance(prepared, PeftModel) else None,
    )


def run_stage(
    recipe: Recipe,
    stage: StageConfig,
    prepared: PreparedStage,
    dataset: TrainData,
    held_out: MultimodalDataset | None = None,
    *,
    folder: StageDirectory,
    state: Mapping[str, Any],
    resume: bool,
    console: Console,
    relief: Relief,
    memory: PlannedMemory | None = None,
) -> None:
    """Train a prepared stage and write its result, with `stage.json` telling how far it came.

    Args:
        held_out: what the Trainer evaluates on, where the stage's `trainer` block has an `eval_strategy`.
        state: what `stage.json` says beside status and figures: name, index, input hash.
        resume: go on from the newest whole checkpoint in `folder`, if there is one.
        relief: what `recipe` and `stage` have been changed in, for memory did not suffice before.
        memory: what was planned.

    Raises:
        RunAgain, MemoryLackError: memory does not suffice, and processes wait for each other.
        RunInterrupted: Ctrl-C; a checkpoint has been written.
        OutputError: the result or a checkpoint could not be written.
    """
    main = PartialState().is_main_process
    batch = plan_batch(recipe, data_processes(stage, PartialState().num_processes))
    steps = count_steps(stage, count_samples(dataset), batch.size)
    checkpoint, done = (on_main(lambda: last_checkpoint(folder.checkpoints)) if resume else None) or (None, None)
    check_writers(checkpoint, zero=ZERO.get(pick_strategy(stage).strategy), processes=PartialState().num_processes)
    state = {**state, "status": "running", "resumed_from": done}
    if checkpoint is not None:
        console.print(f"  {stage.name}: goes on from step {done} of {steps}")
    PartialState().wait_for_everyone()
    if main:
        _begin(folder, state, relief)
    interrupt = StopOnInterrupt(notify=console.print)
    display = ProgressDisplay(stage.name, console)
    trainer = make_trainer(recipe, stage, prepared, (dataset, held_out), folder=folder, batch=batch, steps=steps)
    trainer.proved_whole = checkpoint
    kept = keep_features(recipe, stage, trainer, dataset)
    served = set_workers(recipe, trainer, dataset)
    texts = KeptTokens(recipe, dataset)
    for callback in (MetricsFile(folder.metrics), display, interrupt):
        trainer.add_callback(callback)
    begin = time.perf_counter()
    try:
        with _giving_back(stage), advising(UPDATE_ADVICE):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except BaseException as error:
        if main:
            with contextlib.suppress(OutputError):
                folder.write_state({**state, "status": "failed"})
        Attempt(recipe=recipe, stage=stage, relief=relief, dataset=dataset, folder=folder).end(error, trainer)
        raise
    finally:
        display.close()
        interrupt.release()
    if interrupt.interrupted and trainer.state.global_step < steps:
        if main:
            folder.write_state({**state, "status": "interrupted"})
        raise RunInterrupted(
            f"stopped after step {trainer.state.global_step} of {steps} of stage {stage.name!r}; "
            "its checkpoint is written, and the same command goes on from there"
        )
    figures = {**_figures(trainer, prepared.plan, seconds=time.perf_counter() - begin), **_sharing(stage)}
    if memory is not None:
        figures["memory"] = memory.compare(trainer.args.device.type)
    found = [feature_speedup(trainer, kept), worker_speedup(trainer, served, figures), texts.speedup(trainer)]
    figures["speedups"] = _speedups(recipe, trainer, found, relief, samples=steps * batch.size)
    with gathered(adapter_parameters(prepared.model)):
        if main:
            _write_result(stage, prepared, folder)
            folder.write_state({**state, "status": "done", "figures": figures})
    PartialState().wait_for_everyone()
    forget_strategy()


def _begin(folder: StageDirectory, state: Mapping[str, Any], relief: Relief) -> None:
    """A stage's folder as it begins: empty unless it goes on."""
    if state["resumed_from"] is None:
        remove_directory(folder.path)
        relief.write(folder.relief)
    folder.write_state({**state})


def _giving_back(stage: StageConfig) -> contextlib.AbstractContextManager[None]:
    """On a CPU, what a layer gathers from other processes is host memory."""
    gathers = pick_strategy(stage).strategy in SHARED_OUT and PartialState().device.type == "cpu"
    return returning_memory() if gathers else contextlib.nullcontext()


def _speedups(
    recipe: Recipe, trainer: MultimodalTrainer, found: list[Speedup], relief: Relief, *, samples: int
) -> list[dict[str, Any]]:
    """What the stage's records say of each; `found` are those that other hands than the trainer's know of."""
    packing = packing_speedups(
        recipe.batch,
        packing_obstacle(recipe, trainer.model, trainer.args),
        tokens=trainer.tokens_trained,
        computed=trainer.tokens_computed,
        padded=trainer.tokens_padded,
    )
    rest = compute_speedups(recipe, trainer, samples=samples, relief=relief.changes)
    return [asdict(speedup) for speedup in (*packing, *cut_speedups(recipe, trainer), *found, *rest)]


def make_trainer(
    recipe: Recipe,
    stage: StageConfig,
    prepared: PreparedStage,
    datasets: tuple[TrainData, MultimodalDataset | None],
    *,
    folder: StageDirectory,
    batch: Batch,
    steps: int,
) -> MultimodalTrainer:
    """A stage's trainer, on the data that it trains and evaluates on; nothing is written yet."""
    make_arguments = partial(
        training_arguments, recipe, stage, output=folder.checkpoints, steps=steps, dtype=prepared.dtype
    )
    args = make_arguments(batch=batch)
    packs = packs_rows(recipe, prepared.model, args)
    costs = cost_model(prepared.model, prepared.plan)
    cut = plan_cut(recipe, datasets[0], args, batch=batch, packs=packs, costs=costs, steps=steps)
    args = make_arguments(batch=cut_batch(batch, cut))
    supervised = supervised_only(recipe, prepared.model, args)
    trainer = MultimodalTrainer(
        model=prepared.model,
        args=args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        data_collator=PackedCollator(prepared.processor, share=recipe.batch.share_media, supervised_only=supervised)
        if packs
        else MultimodalCollator(prepared.processor, supervised_only=supervised),
        learning_rates=learning_rates(stage),
        share_media=packs and recipe.batch.share_media and args.train_sampling_strategy in ("random", "sequential"),
        cut=cut,
        compute=plan_compute(recipe, prepared.model, args, samples=steps * batch.size),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _figures(trainer: MultimodalTrainer, plan: TrainingPlan, *, seconds: float) -> dict[str, Any]:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "samples": trainer.samples_trained,
        "tokens": trainer.tokens_trained,
        "tokens_computed": trainer.tokens_computed,
        "tokens_padded": trainer.tokens_padded,
        "seconds": seconds,
        "samples_per_second": trainer.samples_trained / seconds,
        "tokens_per_second": trainer.tokens_trained / seconds,
        **trainer.waits.total(trainer.accelerator),
        "peak_memory_bytes": peak_memory_bytes(trainer.args.device.type),
        "final_loss": losses[-1] if losses else None,
        "trainable_parameters": plan.trainable,
        "total_parameters": plan.total,
        **({"skipped": [vars(sample) for sample in trainer.skips.skipped]} if trainer.skips is not None else {}),
    }


def _sharing(stage: StageConfig) -> dict[str, Any]:
    """How several processes shared a stage."""
    processes = PartialState().num_processes
    return {"processes": processes, "shared_as": pick_strategy(stage).describe()} if processes > 1 else {}


def _write_result(stage: StageConfig, prepared: PreparedStage, folder: StageDirectory) -> None:
    if isinstance(prepared.model, PeftModel):
        save_adapter(prepared.model, folder.adapter, processor=prepared.processor, initial=prepared.initial)
    else:
        save_model(prepared.model, folder.model, processor=prepared.processor)
    if not {"save_strategy", "save_steps", "save_total_limit"}.intersection(stage.trainer):
        remove_directory(folder.checkpoints)
        logger.info("stage %s is done; its checkpoints are removed", stage.name)
