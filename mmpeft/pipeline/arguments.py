"""From a recipe to the Trainer's arguments: the batch on the processes at hand, steps, learning rates."""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from mmpeft.config.names import did_you_mean
from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part
from mmpeft.pipeline.strategy import forget_strategy, pick_strategy, strategy_arguments, told

MICRO_LIMIT = 16
"""Most samples that go through the model at once unless the recipe says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A step's samples, cut for the processes at hand: size = micro * accumulation * processes.

    With a budget of `tokens` the last micro-batch has what is left, and `micro` and `accumulation` follow from the
    samples' lengths (see `mmpeft.pipeline.cutting.cut_batch`); before those are known they are as without it.
    """

    size: int
    micro: int
    accumulation: int
    processes: int
    tokens: int | None = None


def data_processes(stage: StageConfig, processes: int) -> int:
    """How many of a stage's processes, or groups of them, take samples of their own.

    Raises:
        RecipeError: they do not come out even in groups of `tensor_parallel` or `context_parallel`.
    """
    chosen = told(stage)
    degree = chosen.together
    if processes == 1:
        return 1
    if processes % degree:
        key = "tensor_parallel" if chosen.tensor_parallel > 1 else "context_parallel"
        raise RecipeError(
            f"stages.{stage.name}.distributed.{key}: {processes} processes do not make groups of {degree}; "
            f"use a divisor of {processes}"
        )
    return processes // degree


def plan_batch(recipe: Recipe, processes: int) -> Batch:
    """Cut the recipe's global batch into micro-batches.

    Args:
        processes: that take samples of their own.

    Raises:
        RecipeError: it cannot be cut evenly; the message names sizes that can.
    """
    size, micro = recipe.batch.size, recipe.batch.micro
    if size % processes:
        raise RecipeError(f"batch.size: {size} samples cannot be shared by {processes} processes; use a multiple of it")
    share = size // processes
    fitting = [divisor for divisor in range(1, share + 1) if share % divisor == 0]
    if micro is None:
        micro = max(divisor for divisor in fitting if divisor <= MICRO_LIMIT)
    if micro not in fitting:
        raise RecipeError(
            f"batch.micro: {micro} does not divide the {share} samples that each of {processes} process(es) takes a "
            f"step; use one of {', '.join(map(str, fitting))}"
        )
    # How many `auto` is, `mmpeft.pipeline.budget` says once the stage has been rehearsed.
    tokens = None if recipe.batch.tokens == "auto" else recipe.batch.tokens
    return Batch(size=size, micro=micro, accumulation=share // micro, processes=processes, tokens=tokens)


def count_steps(stage: StageConfig, samples: int | None, size: int) -> int:
    """Optimizer steps of a stage; `samples` of an epoch may be unknown where the stage has `max_steps`."""
    return stage.max_steps or max(1, math.ceil(stage.epochs * math.ceil((samples or 0) / size)))


def learning_rates(stage: StageConfig) -> dict[Part, float]:
    """The peak learning rate of each part that the stage trains."""
    trained = [part for part in PARTS if stage.train.get(part, "frozen") != "frozen"]
    rates = stage.learning_rate
    return {part: rates[part] if isinstance(rates, dict) else rates for part in trained}


def training_arguments(
    recipe: Recipe, stage: StageConfig, *, output: Path, batch: Batch, steps: int, dtype: torch.dtype
) -> TrainingArguments:
    """Trainer arguments of a stage: defaults, over them the recipe's `trainer` block, over it what the recipe owns.

    Args:
        output: folder for checkpoints.
        dtype: of the base model's weights; half precision switches autocast on.

    Raises:
        RecipeError: transformers refuses a value of the `trainer` block, or what a value needs is not installed.
    """
    if recipe.compute.checkpointing is True:
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if stage.trainer.get(name) is False:
                raise RecipeError(
                    f"stages.{stage.name}.trainer.{name}: compute.checkpointing is true; drop one of them"
                )
    device = PartialState().device.type
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "logging_steps": 1 if steps <= 200 else 10,
        "save_strategy": "steps",
        "save_steps": min(500, math.ceil(steps / 4)),
        # One to go on from where the newest is damaged.
        "save_total_limit": 2,
        "report_to": "none",
        # It reads every micro-batch's loss from the device, to hide that one is no number.
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "dataloader_pin_memory": device != "cpu",
        "dataloader_persistent_workers": recipe.data.workers != 0,
        # Those of such models are the same everywhere.
        "ddp_broadcast_buffers": False,
        "run_name": f"{recipe.output.name}-{stage.name}",
        # False would take the place of its old name, gradient_checkpointing, in a `trainer` block.
        **({"activation_checkpointing": True} if recipe.compute.checkpointing is True else {}),
    }
    owned: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": batch.micro,
        "per_device_eval_batch_size": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "num_train_epochs": stage.epochs,
        "max_steps": steps if recipe.data.streaming else stage.max_steps or -1,
        "learning_rate": max(learning_rates(stage).values()),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": device == "cpu",
        # How many `auto` is, `mmpeft.pipeline.workers.set_workers` says once the trainer is there.
        "dataloader_num_workers": 1 if recipe.data.workers == "auto" else recipe.data.workers,
    }
    try:
        args = TrainingArguments(**{**defaults, **strategy_arguments(pick_strategy(stage)), **stage.trainer, **owned})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"stages.{stage.name}.trainer: {error}") from error
    _check_libraries(stage, args)
    if args.eval_strategy != "no" and recipe.data.eval is None:
        raise RecipeError(f"stages.{stage.name}.trainer.eval_strategy: there is nothing to evaluate on; give data.eval")
    return args


def _check_libraries(stage: StageConfig, args: TrainingArguments) -> None:
    """Make sure that what the `trainer` block reports to and optimises with exists and is installed."""
    key = f"stages.{stage.name}.trainer"
    installed = get_available_reporting_integrations()
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise RecipeError(f"{key}.report_to: unknown tracker {name!r}{did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in installed and name != "flyte":  # which transformers 5.24 can use, but never lists
            here = f"here are: {', '.join(installed)}" if installed else "no tracker is installed here"
            raise RecipeError(f"{key}.report_to: {name} is not installed ({here}); install it, or leave report_to out")
    # Those optimizers that ask for the model say so by a ValueError; they are looked for when it is there.
    with contextlib.suppress(ValueError):
        try:
            Trainer.get_optimizer_cls_and_kwargs(args)
        except ImportError as error:
            raise RecipeError(f"{key}.optim: {error}") from error


def check_trainer_blocks(recipe: Recipe, samples: int | None, *, training: bool = True) -> None:
    """Find before anything is trained what `training_arguments` would refuse in a later stage.

    Args:
        training: whether these processes will train the stages; a plan's need no launcher for what is offloaded.

    Raises:
        RecipeError: see `training_arguments`.
    """
    for stage in recipe.stages:
        if not training:
            stage = stage.model_copy(update={"distributed": stage.distributed.model_copy(update={"offload": "none"})})
        batch = plan_batch(recipe, data_processes(stage, PartialState().num_processes))
        steps = count_steps(stage, samples, batch.size)
        training_arguments(recipe, stage, output=recipe.output, batch=batch, steps=steps, dtype=torch.float32)
    forget_strategy()
