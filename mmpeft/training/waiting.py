"""How often and how long a training process waits for its data."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

LEAST_SECONDS = 1e-3
"""Fetches that take longer are counted as waits: taking a batch from a loader's queue takes a tenth of that."""


class DataWaits:
    """Counts the time between asking for a micro-batch and having it.

        step     fetch fetch  train train  fetch fetch  train train
        seconds  0.200 0.0001              0.0001 0.003                ->  data_waits 2, data_wait_seconds 0.203

    Without workers that is the time in which samples are opened, encoded and collated; with workers the time in which
    they were not ready, and the start of the workers. Moving a batch to the device is part of it. Asking in vain at the
    end of an epoch is not.

    Args:
        clock: the time in seconds, from anywhere.

    Attributes:
        seconds: waited by this process, in fetches of more than `LEAST_SECONDS`.
        waits: how many these were.
        fetches: micro-batches taken.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.seconds = 0.0
        self.waits = self.fetches = 0
        self._logged = (0.0, 0)

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches, timed; the iterator can be dropped at any place without a batch being lost."""
        return _Watched(batches, self)

    def count(self, seconds: float) -> None:
        """Add a fetch that took so long."""
        self.fetches += 1
        if seconds > LEAST_SECONDS:
            self.seconds += seconds
            self.waits += 1

    def window(self, accelerator: Accelerator) -> dict[str, float]:
        """`data_wait_seconds` and `data_waits` since this was asked last, of the process that waited longest.

        Every process has to ask; they exchange their figures.
        """
        seconds, waits = self.seconds - self._logged[0], self.waits - self._logged[1]
        self._logged = (self.seconds, self.waits)
        return _of_the_slowest(accelerator, seconds, waits)

    def total(self, accelerator: Accelerator) -> dict[str, float]:
        """`data_wait_seconds` and `data_waits` of all training so far; otherwise as `window`."""
        return _of_the_slowest(accelerator, self.seconds, self.waits)


class _Watched:
    def __init__(self, batches: Iterator[Any], waits: DataWaits) -> None:
        self._batches, self._waits = batches, waits

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        start = self._waits.clock()
        batch = next(self._batches)
        self._waits.count(self._waits.clock() - start)
        return batch


def _of_the_slowest(accelerator: Accelerator, seconds: float, waits: int) -> dict[str, float]:
    figures = torch.tensor([[seconds, float(waits)]], device=accelerator.device)
    gathered = accelerator.gather(figures).reshape(-1, 2).cpu()
    slowest = gathered[gathered[:, 0].argmax()].tolist()
    return {"data_wait_seconds": slowest[0], "data_waits": int(slowest[1])}
