"""Samples that a stream leaves out while it is trained on, counted over all processes and bounded as it goes."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmpeft.core.errors import DataError
from mmpeft.core.files import read_json, write_json
from mmpeft.data.batching import StreamBatchSampler
from mmpeft.data.problems import LISTED
from mmpeft.data.stream import SKIP_GRACE
from mmpeft.data.types import SkippedSample

logger = logging.getLogger(__name__)

_NAME = "skipped.json"


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
        self._ended = False

    def save(self, folder: Path) -> None:
        """Note in a checkpoint what was left out before it, for a run that goes on from there does not see it again."""
        if self.skipped:
            write_json(folder / _NAME, [vars(sample) for sample in self.skipped])

    def load(self, folder: Path) -> None:
        """Take over what a checkpoint notes."""
        path = folder / _NAME
        self.skipped = [SkippedSample(**sample) for sample in read_json(path)] if path.exists() else []

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
        ended = self.sampler.rows is not None and not self._ended
        if self.stream.on_error == "error" or not self._any(len(self._new) + ended):
            return
        self._ended = self.sampler.rows is not None
        new = {*self._all(self._new), *self.skipped}
        fresh, self._new = sorted(new - {*self.skipped}, key=_place), []
        self.skipped = sorted(new, key=_place)
        for number, sample in enumerate(fresh):
            logger.log(logging.WARNING if number < LISTED else logging.INFO, "skipped %s", _located(sample))
        rows = self.sampler.rows
        allowed = self.stream.allowed(rows or max(seen, SKIP_GRACE))
        if len(self.skipped) > allowed:
            listed = "".join(f"\n  {_located(sample)}" for sample in self.skipped[:LISTED])
            rest = f"\n  and {len(self.skipped) - LISTED} more" if len(self.skipped) > LISTED else ""
            raise DataError(
                f"{len(self.skipped)} samples cannot be used:{listed}{rest}\nmax_skipped allows {allowed} of "
                f"{rows or f'the first {seen}'}: correct the file, or raise max_skipped"
            )

    def _any(self, count: int) -> bool:
        """Whether any process has something to say."""
        counts = torch.tensor(float(count), device=self.accelerator.device)
        return bool(self.accelerator.reduce(counts, reduction="sum").item())

    def _all(self, mine: list[SkippedSample]) -> list[SkippedSample]:
        return gather_object(mine) if self.accelerator.num_processes > 1 else mine


def _place(sample: SkippedSample) -> tuple[str, int]:
    return sample.file, sample.index


def _located(sample: SkippedSample) -> str:
    return f"{sample.file}:{sample.line}: sample {sample.index}: {sample.reason}"
