"""Several sources as one data set, each with a weight: how often its samples come up in an epoch."""

import contextlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import DataError
from mmpeft.core.hashing import hash_value
from mmpeft.data.augment import AugmentSettings
from mmpeft.data.encode import Encoded
from mmpeft.data.feature_store import FeatureStore
from mmpeft.data.sample_lengths import Lengths
from mmpeft.data.types import Sample, SkippedSample


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that samples come from.

    Attributes:
        path: a data file, or a directory in a layout that is known.
        weight: samples shown an epoch, relative to the number that the source has (see `MixedDataset`).
        media_root: folder that its media paths are relative to; default: the one given for all, else its own.
        name: what messages and the report call it; default: the file's name without suffix.
        columns: which column of a table holds what (see `read_rows`).
        question: the question of samples that have none, such as pictures with captions.
    """

    path: str | Path
    weight: float = 1.0
    media_root: str | Path | None = None
    name: str | None = None
    columns: Mapping[str, str] | None = None
    question: str | None = None


def sources_of(values: Sequence[Any]) -> list[Source]:
    """Paths, mappings of `Source`'s fields, or `Source`s as sources, each under a name of its own.

    Raises:
        DataError: an unknown field, a weight that is none, or one name for two sources.
    """
    if not values:
        raise DataError("found no source; give at least one path")
    found = [_source(value, number) for number, value in enumerate(values)]
    stems = Counter(Path(source.path).stem for source in found if source.name is None)
    named = []
    for source in found:
        stem = Path(source.path).stem
        named.append(source.name or (stem if stems[stem] == 1 else str(source.path)))
    for name, count in Counter(named).items():
        if count > 1:
            raise DataError(f"{count} sources are named {name!r}; give each a `name` of its own")
    return [replace(source, name=name) for source, name in zip(found, named, strict=True)]


def _source(value: Any, number: int) -> Source:
    if isinstance(value, str | Path):
        return Source(path=value)
    if isinstance(value, Mapping):
        known = [field.name for field in fields(Source)]
        for key in value:
            if key not in known:
                raise DataError(f"source {number}: unknown field {key!r}{did_you_mean(str(key), known)}")
        if "path" not in value:
            raise DataError(f"source {number}: no `path`; give the data file")
        value = Source(**value)
    if not isinstance(value, Source):
        raise DataError(f"source {number}: found {value!r}; expected a path, or a mapping with `path` and `weight`")
    if not (isinstance(value.weight, int | float) and math.isfinite(value.weight) and value.weight > 0):
        raise DataError(f"source {number} ({value.path}): weight {value.weight!r}; expected a number above 0")
    return value


class Samples(Protocol):
    """What a mixture asks of the data sets it is made of."""

    skipped: list[SkippedSample]
    truncated: int

    def __len__(self) -> int: ...
    def encoded(self, index: int, *, epoch: int) -> Encoded:
        """Sample `index` as epoch `epoch` has it."""

    def sample(self, index: int) -> Sample:
        """Sample `index`, not encoded."""

    def lengths(self, epoch: int = 0) -> Lengths:
        """How long its samples are in tokens."""

    def set_epoch(self, epoch: int) -> None:
        """Take samples as epoch `epoch` has them."""

    def augment_with(self, settings: AugmentSettings, *, seed: int = 0) -> None:
        """Vary samples from epoch to epoch."""

    def keep_features(self, store: FeatureStore | None, identity: str = "") -> None:
        """Take what is kept of samples' media."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A source in a mixture.

    Attributes:
        dataset: all its samples.
        count: how many of them an epoch shows.
    """

    name: str
    weight: float
    dataset: Any
    count: int

    @property
    def samples(self) -> int:
        """How many the source has."""
        return len(self.dataset)


class MixedDataset(Dataset[Encoded]):
    """Samples of several sources; an epoch shows `weight` times as many of each as it has.

    A weight of 1 shows every sample once an epoch, 2 shows each twice, 0.5 shows one half in one epoch and the
    other half in the next. (It is what InternVL calls `repeat_time`, but no sample is left out for good.) So
    1 for all is the same as one file that holds all. Precisely: a source of n samples shows round(weight * n) of
    them an epoch, one at least. Pass after pass over the source, each in an order of its own, is cut into epochs:

        n = 4, weight 1.5      pass 0      pass 1      pass 2
                               c a d b     b d a c     a b d c
        6 an epoch             epoch 0 --------| epoch 1 ------|

    Nothing comes up again before everything else has. The order depends on seed and epoch only, so it is the
    same on any number of processes and after a resume. Made by `load_dataset` from a list.

    Args:
        sources: pairs of a source, named, and its data set.
        seed: of the passes' orders.

    Attributes:
        parts: the sources with their names, weights and counts.
    """

    def __init__(self, sources: Sequence[tuple[Source, Samples]], *, seed: int = 0) -> None:
        self.parts = tuple(
            Part(
                name=source.name or str(source.path),
                weight=float(source.weight),
                dataset=dataset,
                count=samples_an_epoch(len(dataset), source.weight),
            )
            for source, dataset in sources
        )
        self.seed = seed
        self._ends = list(accumulate(part.count for part in self.parts))
        # Shared memory, so that a loader's workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._drawn: tuple[int, list[torch.Tensor]] | None = None

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self._ends[-1]

    @property
    def skipped(self) -> list[SkippedSample]:
        """Those of all sources."""
        return [sample for part in self.parts for sample in part.dataset.skipped]

    @property
    def truncated(self) -> int:
        """Samples of all sources that are cut."""
        return sum(part.dataset.truncated for part in self.parts)

    @property
    def epoch(self) -> int:
        """The epoch whose samples these are, from 0."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Show the samples of epoch `epoch` (from 0) from now on; `MultimodalTrainer` calls it."""
        self._epoch.fill_(epoch)
        for part in self.parts:
            part.dataset.set_epoch(epoch)

    def augment_with(self, settings: AugmentSettings, *, seed: int = 0) -> None:
        """Vary the samples of all sources each time that they come up, also within an epoch."""
        for part in self.parts:
            part.dataset.augment_with(settings, seed=seed)

    def keep_features(self, store: FeatureStore | None, identity: str = "") -> None:
        """Take what `store` keeps of the media of all sources; see `MultimodalDataset.keep_features`."""
        for part in self.parts:
            part.dataset.keep_features(store, identity)

    def place(self, index: int) -> tuple[int, int]:
        """Where sample `index` of this epoch comes from: which part, and which sample of it."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index % len(self))
        return number, int(self._rows()[number][self._within(number, index)])

    def _within(self, number: int, index: int) -> int:
        """How many samples of part `number` come before sample `index` of this epoch."""
        return index % len(self) - (self._ends[number] - self.parts[number].count)

    def __getitem__(self, index: int) -> Encoded:
        """Sample `index` of this epoch, encoded.

        Raises:
            DataError: its media cannot be decoded: names source, file, line, sample and reason.
        """
        number, row = self.place(index)
        part = self.parts[number]
        # A sample comes up once in each pass over its source, so by passes each time is varied anew.
        shown = self.epoch * part.count + self._within(number, index)
        with naming_source(part.name):
            return part.dataset.encoded(row, epoch=shown // len(part.dataset))

    def media_key(self, index: int) -> int:
        """A number that samples of one source on the same media have in common; 0 for one without any."""
        number, row = self.place(index)
        key = self.parts[number].dataset.media_key(row)
        return (key and hash((number, key))) or 0

    def media_kinds(self, index: int) -> int:
        """Which kinds of media a sample has: 1 for pictures, 2 for films, 4 for recordings, or their sum."""
        number, row = self.place(index)
        return self.parts[number].dataset.media_kinds(row)

    def lengths(self, epoch: int = 0) -> Lengths:
        """How long the samples of an epoch (from 0) are in tokens, see `sample_lengths`; whichever epoch it is now.

        Raises:
            DataError: a sample that cannot be measured: names source, file, line, sample and reason.
        """
        found = []
        for part, rows in zip(self.parts, self._rows_of(epoch), strict=True):
            with naming_source(part.name):
                found.append(part.dataset.lengths()[rows.numpy()])
        return np.concatenate(found)

    def sample(self, index: int) -> Sample:
        """Sample `index` of this epoch as it stands in its file; no picture is opened."""
        number, row = self.place(index)
        return self.parts[number].dataset.sample(row)

    def _rows(self) -> list[torch.Tensor]:
        """For each part the samples of this epoch."""
        epoch = self.epoch
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._rows_of(epoch)
        return self._drawn[1]

    def _rows_of(self, epoch: int) -> list[torch.Tensor]:
        return [
            rows_of_epoch(len(part.dataset), part.count, epoch=epoch, seed=self.seed, source=number)
            for number, part in enumerate(self.parts)
        ]


@contextlib.contextmanager
def naming_source(name: str) -> Iterator[None]:
    """Put the name of a source before the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        raise DataError(f"source {name!r}: {error}") from error


def samples_an_epoch(size: int, weight: float) -> int:
    """How many samples of a source of `size` an epoch shows; one at least."""
    return max(1, math.floor(weight * size + 0.5))


def rows_of_epoch(size: int, count: int, *, epoch: int, seed: int, source: int) -> torch.Tensor:
    """The samples [count] that an epoch shows of a source that has `size`; see `MixedDataset`.

    Where an epoch holds whole passes their order is that of the file: what shuffles an epoch shuffles them too.
    """
    first, end = epoch * count, (epoch + 1) * count
    pieces = []
    for number in range(first // size, -(-end // size)):
        if count % size:
            digest = hash_value([seed, source, number])
            generator = torch.Generator().manual_seed(int(digest[:15], 16))
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.arange(size)
        pieces.append(order[max(0, first - number * size) : end - number * size])
    return torch.cat(pieces)
