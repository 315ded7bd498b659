"""Samples that a stream leaves out while it is trained on, counted over all processes and bounded as it goes."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmpeft.data.batching import StreamBatchSampler
from mmpeft.data.problems import LISTED, Problem, problems_error
from mmpeft.data.stream import SKIP_GRACE
from mmpeft.data.types import SkippedSample

logger = logging.getLogger(__name__)


class SkipWatch:
    """Notes what a stream's batches say was left out.

    Attributes:
        skipped: the samples left out by all processes, each once, in the order of the file.
    """

    def __init__(self, sampler: StreamBatchSampler, accelerator: Accelerator) -> None:
        self.sampler, self.accelerator = sampler, accelerator
        self.stream = sampler.stream
        self.skipped: list[SkippedSample] = []
        self._new: list[SkippedSample] = []

    def unpack(self, batches: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches as the model takes them."""
        for batch in batches:
            plain = dict(batch)
            self._new += plain.pop("skipped", ())
            yield plain

    def check(self, seen: int) -> None:
        """Exchange what is new among the processes, and stop where too much was left out.

        Args:
            seen: samples taken so far, by all processes.

        Raises:
            DataError: more than `max_skipped`; lists the samples.
        """
        if self.stream.on_error == "error" or not self._any_new():
            return
        new = {*self._all(self._new), *self.skipped}
        fresh, self._new = sorted(new - {*self.skipped}, key=_place), []
        self.skipped = sorted(new, key=_place)
        for number, sample in enumerate(fresh):
            level = logging.WARNING if number < LISTED else logging.INFO
            logger.log(level, "skipped %s:%d: sample %d: %s", sample.file, sample.line, sample.index, sample.reason)
        rows = self.sampler.rows
        allowed = self.stream.allowed(rows or max(seen, SKIP_GRACE))
        if len(self.skipped) > allowed:
            problems = [Problem(index=each.index, line=each.line, reason=each.reason) for each in self.skipped]
            so_far = f"of {rows}" if rows else f"of the first {seen}"
            raise problems_error(
                self.stream.path,
                problems,
                advice=f"max_skipped allows {allowed} {so_far}: correct the file, or raise max_skipped",
            )

    def _any_new(self) -> bool:
        count = torch.tensor(float(len(self._new)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(count, reduction="sum").item())

    def _all(self, mine: list[SkippedSample]) -> list[SkippedSample]:
        return gather_object(mine) if self.accelerator.num_processes > 1 else mine


def _place(sample: SkippedSample) -> int:
    return sample.index
