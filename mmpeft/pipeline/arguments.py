"""From a recipe to the Trainer's arguments: the batch on the processes at hand, steps, learning rates."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part

MICRO_LIMIT = 16
"""Most samples that go through the model at once unless the recipe says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A step's samples, cut for the processes at hand: size = micro * accumulation * processes."""

    size: int
    micro: int
    accumulation: int
    processes: int


def plan_batch(recipe: Recipe, processes: int) -> Batch:
    """Cut the recipe's global batch into micro-batches.

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
    return Batch(size=size, micro=micro, accumulation=share // micro, processes=processes)


def count_steps(stage: StageConfig, samples: int, size: int) -> int:
    """Optimizer steps of a stage."""
    return stage.max_steps or max(1, math.ceil(stage.epochs * math.ceil(samples / size)))


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
        RecipeError: transformers refuses a value of the `trainer` block.
    """
    device = PartialState().device.type
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "logging_steps": 1 if steps <= 200 else 10,
        "save_strategy": "steps",
        "save_steps": min(500, math.ceil(steps / 4)),
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "dataloader_pin_memory": device != "cpu",
        "dataloader_persistent_workers": recipe.data.workers > 0,
        "run_name": f"{recipe.output.name}-{stage.name}",
    }
    owned: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": batch.micro,
        "per_device_eval_batch_size": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "num_train_epochs": stage.epochs,
        "max_steps": stage.max_steps or -1,
        "learning_rate": max(learning_rates(stage).values()),
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "use_cpu": device == "cpu",
        "dataloader_num_workers": recipe.data.workers,
    }
    try:
        return TrainingArguments(**{**defaults, **stage.trainer, **owned})
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"stages.{stage.name}.trainer: {error}") from error
