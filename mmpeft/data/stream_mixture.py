"""Several streams as one, each with a weight, as `MixedDataset` is of files that are indexed."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import IterableDataset

from mmpeft.data.augment import AugmentSettings
from mmpeft.data.encode import Encoded
from mmpeft.data.feature_store import FeatureStore
from mmpeft.data.mixture import Source, naming_source, samples_an_epoch
from mmpeft.data.stream import Place, StreamingDataset, Taken, take_from


@dataclass(frozen=True, kw_only=True)
class StreamedPart:
    """A source in a mixture of streams.

    Attributes:
        name, weight: of the source.
        dataset: its stream.
        samples: how many rows it has, counted once.
        count: how many of them an epoch shows.
    """

    name: str
    weight: float
    dataset: StreamingDataset
    samples: int
    count: int


class StreamedMixture(IterableDataset[Encoded]):
    """Samples of several sources, read while training; an epoch shows `weight` times as many of each as it has.

    What a weight means, and that nothing comes up again before everything else of its source has, is as
    `MixedDataset` says; so the rows of each source are counted first, without being kept. Sources are drawn from
    evenly, all to their ends together, and each through a shuffle buffer of its own:

        a has 6, b has 3        a b a a b a a b a

    Made by `load_dataset` from a list with `streaming=True`.

    Attributes:
        parts: the sources with their names, weights and counts.
        path: of the first, for messages.
    """

    def __init__(self, sources: Sequence[tuple[Source, StreamingDataset]]) -> None:
        parts = []
        for source, dataset in sources:
            name = source.name or str(source.path)
            with naming_source(name):
                samples = dataset.count()
            count = samples_an_epoch(samples, source.weight)
            parts.append(
                StreamedPart(name=name, weight=float(source.weight), dataset=dataset, samples=samples, count=count)
            )
        self.parts = tuple(parts)
        self._datasets, self._names = [part.dataset for part in parts], [part.name for part in parts]
        self.path: Path = parts[0].dataset.path
        self.on_error = parts[0].dataset.on_error
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(part.count for part in self.parts)

    def set_epoch(self, epoch: int) -> None:
        """Show the samples of epoch `epoch` (from 0) in plain loaders; `MultimodalTrainer` counts by itself."""
        self._epoch.fill_(epoch)

    def augment_with(self, settings: AugmentSettings, *, seed: int = 0) -> None:
        """Vary the samples of all sources each time that they come up; see `MultimodalDataset.augment_with`."""
        for part in self.parts:
            part.dataset.augment_with(settings, seed=seed)

    def keep_features(self, store: FeatureStore | None, identity: str = "") -> None:
        """Take what `store` keeps of the media of all sources; see `MultimodalDataset.keep_features`."""
        for part in self.parts:
            part.dataset.keep_features(store, identity)

    def __iter__(self) -> Iterator[Encoded]:
        """All samples of the epoch; in a loader's worker those that are its own."""
        info = torch.utils.data.get_worker_info()
        step, first = (info.num_workers, info.id) if info is not None else (1, 0)
        for place in islice(self.places(int(self._epoch)), first, None, step):
            yield from self.take([place])

    def places(self, epoch: int) -> Iterator[Place]:
        """The samples of epoch `epoch` in their order; opens no media.

        Raises:
            DataError: a source cannot be read.
        """
        streams = [_shown(part, number, epoch) for number, part in enumerate(self.parts)]
        # Whoever has shown the smallest share of what it is to show comes next.
        shares = [(1 / part.count, number, 1) for number, part in enumerate(self.parts)]
        heapq.heapify(shares)
        while shares:
            _, number, shown = shares[0]
            with naming_source(self.parts[number].name):
                place = next(streams[number], None)
            if place is None:
                heapq.heappop(shares)
                continue
            yield place
            heapq.heapreplace(shares, ((shown + 1) / self.parts[number].count, number, shown + 1))

    def take(self, places: Sequence[Place]) -> Taken:
        """The samples at some places, encoded; see `StreamingDataset.take`.

        Raises:
            DataError: a sample cannot be used: names source, file, line, sample and reason.
        """
        return take_from(self._datasets, places, self._names)

    def allowed(self, seen: int) -> int:
        """How many samples of all sources may have been skipped after `seen` of them."""
        return self.parts[0].dataset.allowed(seen)


Stream = StreamingDataset | StreamedMixture
"""Samples that are read while training."""


def _shown(part: StreamedPart, number: int, epoch: int) -> Iterator[Place]:
    """What an epoch shows of a source: its share of the endless passes over it."""
    position, end = epoch * part.count, (epoch + 1) * part.count
    while position < end:
        which, offset = divmod(position, part.samples)
        found = 0
        for place in islice(part.dataset.places(which), offset, offset + end - position):
            found += 1
            yield place._replace(source=number)
        if not found:
            return
        position += found
