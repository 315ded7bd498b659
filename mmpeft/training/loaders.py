"""Loaders whose global batches are the same on any number of processes."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mmpeft.core.errors import DataError, RecipeError
from mmpeft.data.balancing import CostBatchSampler, Cut
from mmpeft.data.batching import (
    BlankedDataset,
    GlobalBatchSampler,
    MediaInEach,
    NumberedCollator,
    NumberedDataset,
    StreamBatchSampler,
    StreamCollator,
    StreamedRows,
)
from mmpeft.data.stream_mixture import Stream


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which samples of each global batch a process takes: the `rank`-th of `world` parts, from 0.

    Processes that share matrices or tokens out take the same.
    """

    world: int
    rank: int


def global_loader(
    dataset: Any,
    args: TrainingArguments,
    collator: Callable[..., Any],
    share: Share,
    *,
    share_media: bool = False,
    cut: Cut | None = None,
    media_in_each: bool = False,
) -> DataLoader:
    """A loader over an indexed data set, for one of any number of processes; its batches hold `numbers` as well.

    Args:
        share: what this process takes.
        share_media: bring samples on the same media together; the data set has `media_key(index)`.
        cut: how steps are cut by cost; default: in their order.
        media_in_each: let no micro-batch lack a kind of media that others have; the data set has `media_kinds(index)`.

    Raises:
        RecipeError: a `train_sampling_strategy` that is made for one process.
    """
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise RecipeError(
            f"train_sampling_strategy={args.train_sampling_strategy!r}: batches are cut so that they are the same on "
            "any number of processes; use 'random' or 'sequential'"
        )
    sampler: Any
    if cut is not None:
        sampler = CostBatchSampler(cut, world=share.world, rank=share.rank)
    else:
        sampler = GlobalBatchSampler(
            length=len(dataset),
            micro=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world=share.world,
            rank=share.rank,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            shuffle=args.train_sampling_strategy == "random",
            media=dataset.media_key if share_media else None,
        )
    if media_in_each:
        sampler = MediaInEach(sampler, dataset.media_kinds, len(dataset))
    rows = NumberedDataset(BlankedDataset(dataset))
    return _EpochLoader(rows, batch_sampler=sampler, collate_fn=NumberedCollator(collator), **_workers(args))


def stream_sampler(dataset: Stream, args: TrainingArguments, share: Share) -> StreamBatchSampler:
    """What cuts a stream for this process; `args.max_steps` says how much of it is read.

    Raises:
        RecipeError: a `train_sampling_strategy`, which needs all samples at hand.
    """
    if args.train_sampling_strategy != "random":
        raise RecipeError(
            f"train_sampling_strategy={args.train_sampling_strategy!r}: a stream has no other order than that of "
            "shuffle_buffer (1 keeps the file's); leave it out"
        )
    return StreamBatchSampler(
        dataset,
        steps=args.max_steps,
        micro=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        world=share.world,
        rank=share.rank,
    )


def stream_loader(sampler: StreamBatchSampler, args: TrainingArguments, collator: Callable[..., Any]) -> DataLoader:
    """A loader over a stream, for one process or one of several."""
    rows = StreamedRows(sampler.stream)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=StreamCollator(collator), **_workers(args))


def _workers(args: TrainingArguments) -> dict[str, Any]:
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type != "cpu",
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "generator": seeds_of_workers(args),
    }


def seeds_of_workers(args: TrainingArguments) -> torch.Generator:
    """What a loader draws its workers' seeds from; without it, it draws from what dropout draws from.

    Workers that outlive an epoch are given a seed once. A run that goes on starts them in the midst of training, and
    dropout would have other numbers from there on than in a run that never stopped.
    """
    return torch.Generator().manual_seed(args.data_seed if args.data_seed is not None else args.seed)


class _EpochLoader(DataLoader):
    """A DataLoader that hands the Trainer's epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def end_workers(loader: Any) -> None:
    """End workers that outlive an epoch, now and in this thread.

    torch 2.13 ends them when the iterator that a loader keeps is collected. Where that happens in the thread which
    has to tell them, it waits five seconds for a worker that has not been told.
    """
    base = getattr(loader, "base_dataloader", loader)
    if getattr(base, "_iterator", None) is not None:
        base._iterator = None


@contextlib.contextmanager
def naming_lost_workers() -> Iterator[None]:
    """Say what it means that a worker has gone, which torch 2.13 tells from wherever the training process then is.

    Raises:
        DataError: a worker was killed, or ended by itself.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:
        found = _LOST.search(str(error if isinstance(error, RuntimeError) else _told_since(error)))
        if found is None:
            raise
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise this again wherever the next of the other workers ends, in mid-write even.
            # A later loader of this process finds out by itself whether its workers live, every five seconds.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise DataError(
            f"a worker that prepares samples ({found[1]}) has gone: {found[2].strip()}. Mostly that is the machine's "
            "memory running out; use a smaller data.workers (0 prepares samples in the training process), or smaller "
            "pictures and films (data.max_pixels, data.media)"
        ) from error


def _told_since(error: Exception) -> Exception:
    """What is known of a lost worker after a sample could not be fetched from it; the same error if none was lost.

    Its end may show later than that of what it was sending; and torch tells of one lost worker in a process only, for
    `naming_lost_workers` takes its signal handler away.
    """
    try:
        for _ in range(_LOOKS):
            time.sleep(_LOOK_SECONDS)
            if (gone := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                signalled = gone.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                how = "is killed by signal" if signalled else "exited unexpectedly with exit code"
                return RuntimeError(f"DataLoader worker (pid {gone.si_pid}) {how} {gone.si_status}")
    except RuntimeError as told:
        return told
    except ChildProcessError:
        pass
    return error


_LOOKS, _LOOK_SECONDS = 20, 0.1

_LOST = re.compile(r"DataLoader worker \((pid\S* [^)]*)\) ((?:is killed by|exited unexpectedly)[^.]*)")


def from_worker(error: DataError) -> DataError:
    """An error as it was raised, without the traceback that torch puts before its message in a loader's worker."""
    name = f"{DataError.__module__}.{DataError.__qualname__}: "
    text = str(error)
    return DataError(text.rpartition(name)[2].rstrip()) if text.startswith("Caught ") else error
