"""A recipe's `data.workers` on a stage: how many processes make samples ahead of training, and whether it had to wait.

    samples          trained on a CPU    elsewhere
    with media       1                   a process's share of the cores but one, 1 to 8
    text alone       0                   1

A CPU that trains has nothing to spare: one worker does beside the step what would be done between steps, and fills the
gaps where the step runs on one core; more would only take turns with it. Text takes about a millisecond a sample.
Elsewhere cores are idle while the device computes. Where features of media are kept the first pass still decodes, and
workers that have nothing left to do cost memory alone, which they share with the training process.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

from accelerate import PartialState

from mmpeft.config.recipe import Recipe
from mmpeft.core.speed import Speedup
from mmpeft.data.stream_mixture import Stream
from mmpeft.pipeline.data import TrainData
from mmpeft.training.trainer import MultimodalTrainer

NAME = "data.workers"

MOST = 8
"""Workers of a training process that the recipe does not set; each holds micro-batches in memory."""

LEAST_PREFETCH, MOST_PREFETCH = 2, 16
"""Micro-batches that a worker makes ahead."""


def auto_workers(*, device: str, cores: int, media: bool) -> int:
    """How many workers a training process gets.

    Args:
        device: the type of what it trains on.
        cores: its share of the machine's.
        media: whether any sample has pictures, films or recordings.
    """
    if device == "cpu":
        return int(media)
    return max(1, min(MOST, cores - 1)) if media else 1


def prefetch_factor(*, workers: int, accumulation: int) -> int:
    """Micro-batches that each worker makes ahead: all of the next step, for the Trainer asks for them at once.

    Args:
        workers: at least 1.
        accumulation: micro-batches of a step.
    """
    return min(MOST_PREFETCH, max(LEAST_PREFETCH, math.ceil(accumulation / workers)))


def set_workers(recipe: Recipe, trainer: MultimodalTrainer, dataset: TrainData) -> str:
    """Give a stage's trainer its workers, before it trains.

    A `trainer` block's `dataloader_prefetch_factor` and `dataloader_persistent_workers` hold.

    Returns:
        Why there are as many, in one sentence.
    """
    args = trainer.args
    if recipe.data.workers == "auto":
        state = PartialState()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        cores = max(1, len(os.sched_getaffinity(0)) // here) if hasattr(os, "sched_getaffinity") else 2
        media = _has_media(dataset)
        count = auto_workers(device=args.device.type, cores=cores, media=media)
        kind = "samples have media" if media else "samples are text alone"
        why = f"{kind}, and a process trains on {args.device.type} with {cores} core(s) of its own"
    else:
        count, why = recipe.data.workers, "it was asked for"
    args.dataloader_num_workers = count
    args.dataloader_persistent_workers = args.dataloader_persistent_workers and count > 0
    if not count:
        args.dataloader_prefetch_factor = None
    elif args.dataloader_prefetch_factor is None:
        args.dataloader_prefetch_factor = prefetch_factor(workers=count, accumulation=args.gradient_accumulation_steps)
    return why


def worker_speedup(trainer: MultimodalTrainer, why: str, figures: Mapping[str, float]) -> Speedup:
    """How a stage that has trained was served, by the process that waited longest.

    Args:
        why: what `set_workers` said.
        figures: of the stage: `seconds`, and what `DataWaits.total` says.
    """
    count = trainer.args.dataloader_num_workers
    share = 100 * figures["data_wait_seconds"] / figures["seconds"]
    return Speedup(
        name=NAME,
        on=count > 0,
        why=f"{why}: {count} worker(s); training waited {figures['data_waits']:,} times, {share:.1f} % of its time",
        saved={"waits": trainer.waits.fetches - figures["data_waits"]} if count else {},
    )


def _has_media(dataset: Any) -> bool:
    # A stream's media are not known before they come.
    return isinstance(dataset, Stream) or any(map(dataset.media_key, range(len(dataset))))
