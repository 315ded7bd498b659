"""Which samples share a step, the same on any number of processes."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mmpeft.core.errors import DataError
from mmpeft.core.host import OnHost
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.encode import Encoded
from mmpeft.data.stream import Place, Taken
from mmpeft.data.stream_mixture import Stream

TOGETHER = 8
"""Most samples on the same media that are brought together: more would leave too few media in a step."""


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process, cut from global batches that do not depend on how many processes there are.

    One global batch of 12 samples, two processes, micro-batches of 3 (so two accumulation steps):

        shuffled     a b c   d e f   g h i   j k l
        process 0    a b c           g h i
        process 1            d e f           j k l

    The last global batch of an epoch may be smaller. Its samples are dealt out evenly; a process that would get
    none gets one as a blank: the index `-1 - i`, which `BlankedDataset` returns with no label, so that it takes
    part in the step (collectives match) and adds exactly nothing to loss and gradients.

    The order is accelerate's `SeedableRandomSampler`: a permutation by torch's generator seeded with
    `seed + epoch`, so that one process sees what `transformers.Trainer` shows it.

    With `media`, samples on the same media come together, up to `TOGETHER` of them: the first of them in the shuffled
    order takes the others with it, and the order is otherwise what it was. It does not depend on `micro`.

    Args:
        length: samples in the data set.
        micro: samples of one process that go through the model at once.
        accumulation: micro-batches of one process in a step.
        world, rank: number of processes, and which one this is.
        seed: of the shuffle; the epoch is added to it.
        shuffle: False takes samples in the order of the data set.
        media: for a sample a value that those on the same media have in common; a false one for none.
    """

    def __init__(
        self,
        *,
        length: int,
        micro: int,
        accumulation: int,
        world: int,
        rank: int,
        seed: int,
        shuffle: bool = True,
        media: Callable[[int], Hashable] | None = None,
    ) -> None:
        self.length, self.micro, self.accumulation = length, micro, accumulation
        self.world, self.rank, self.seed, self.epoch = world, rank, seed, 0
        self.shuffle, self.media = shuffle, media

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as epoch `epoch` (from 0) does."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.micro * self.accumulation * self.world)
        return whole * self.accumulation + -(-rest // (self.micro * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = shuffled(self.length, self.seed + self.epoch) if self.shuffle else np.arange(self.length)
        if self.media is not None:
            order = together(order, _keys(self.length, self.media), TOGETHER)
        width = self.micro * self.world
        for start in range(0, self.length, width):
            chunk = order[start : start + width]
            yield chunk[_share(len(chunk), self.world, self.rank)].tolist() or [-1 - int(chunk[0])]


class MediaInEach(Sampler[list[int]]):
    """The micro-batches of another sampler, to which blanks are added so that each has media of every kind.

        text text     ->   text text (picture)
        text picture  ->   text picture

    Where gradients are sent in the order in which backward finds them (DeepSpeed), a process with text alone would
    send other ones than those that the others wait for; and of an update it keeps only the gradients of what the last
    micro-batch has reached.

    Args:
        batches: its `set_epoch` is called on.
        kinds: bits that say of which kinds a sample has media.
        length: samples in the data set.
    """

    def __init__(self, batches: Any, kinds: Callable[[int], int], length: int) -> None:
        self.batches, self.kinds, self.length = batches, kinds, length

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as epoch `epoch` (from 0) does."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        examples: dict[int, int] | None = None
        for batch in self.batches:
            if examples is None:
                # Not before the epoch has begun: a mixture has other samples in each.
                examples = self._examples()
            there = 0
            for index in batch:
                there |= self.kinds(index if index >= 0 else -1 - index)
            yield batch + [-1 - index for kind, index in examples.items() if not there & kind]

    def _examples(self) -> dict[int, int]:
        """For each kind of media the first sample that has it."""
        found: dict[int, int] = {}
        for index in range(self.length):
            kinds = self.kinds(index)
            while kinds:
                lowest = kinds & -kinds
                found.setdefault(lowest, index)
                kinds ^= lowest
        return found


class StreamBatchSampler(Sampler[list[Place]]):
    """Micro-batches of one process out of a stream, cut as `GlobalBatchSampler` cuts an epoch in file order.

    It goes over the stream again and again until it has enough steps. The last global batch of an epoch may be
    smaller; micro-batches that this leaves without a sample are blanks, so that each step has as many:

        10 samples, steps of 8, two processes, micro-batches of 2
        process 0    a b    e f  |  i    (i)  |  …
        process 1    c d    g h  |  j    (i)  |

    Where rows lie is found out here, in the training process; reading them is left to the loader's workers. So
    going on from a checkpoint means passing over places, not over samples.

    Args:
        stream: where the rows come from.
        steps: optimizer steps.
        micro, accumulation, world, rank: as in `GlobalBatchSampler`.

    Attributes:
        rows: rows of an epoch; None until one has ended.
    """

    def __init__(self, stream: Stream, *, steps: int, micro: int, accumulation: int, world: int, rank: int) -> None:
        self.stream, self.steps = stream, steps
        self.micro, self.accumulation, self.world, self.rank = micro, accumulation, world, rank
        self.rows: int | None = None

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        width = self.micro * self.world
        left, epoch = self.steps, 0
        while left:
            places, rows = self.stream.places(epoch), 0
            following = next(places, None)
            if following is None:
                raise DataError(f"{self.stream.path}: holds no sample any more; it was emptied while it was read")
            while left and following is not None:
                batch = [following, *islice(places, width * self.accumulation - 1)]
                following = next(places, None)
                left, rows = left - 1, rows + len(batch)
                self.rows = rows if following is None else self.rows
                for start in range(0, width * self.accumulation, width):
                    chunk = batch[start : start + width]
                    mine = chunk[_share(len(chunk), self.world, self.rank)]
                    yield mine or [batch[0]._replace(blank=True)]
            epoch += 1


class StreamedRows(Dataset[Any]):
    """A stream as a data set whose indices are lists of `Place`: what a loader's workers read from."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, place: Place) -> Encoded:
        return self.stream.take([place])[0]

    def __getitems__(self, places: Sequence[Place]) -> Taken:
        """One micro-batch, in one go."""
        return self.stream.take(places)


class StreamCollator:
    """Another collator, whose batch also names the samples that were left out, where there are any."""

    def __init__(self, collator: Callable[[Sequence[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        """The micro-batch; of a `Taken` that left samples out also `skipped`, a tuple of `SkippedSample`."""
        batch = dict(self.collator(samples))
        skipped = samples.skipped if isinstance(samples, Taken) else ()
        return {**batch, "skipped": skipped} if skipped else batch


def _share(samples: int, world: int, rank: int) -> slice:
    """Which of so many samples process `rank` has, where they are dealt out evenly."""
    share, extra = divmod(samples, world)
    begin = rank * share + min(rank, extra)
    return slice(begin, begin + share + (rank < extra))


def shuffled(samples: int, seed: int) -> np.ndarray:
    """A permutation [samples] by torch's generator, 8 bytes a sample."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).numpy()


def _keys(samples: int, media: Callable[[int], Hashable]) -> np.ndarray:
    """For each sample a number that those on the same media have in common; 0 for none."""
    keys = (hash(key) or 1 if (key := media(sample)) else 0 for sample in range(samples))
    return np.fromiter(keys, dtype=np.int64, count=samples)


def together(order: np.ndarray, keys: np.ndarray, most: int) -> np.ndarray:
    """The order with samples on the same media side by side, `most` of them at once.

        order   a1 b1 c1 a2 b2 a3      most 2   ->   a1 a2 b1 b2 c1 a3

    Args:
        order: [samples of an epoch], their indices.
        keys: [samples of the data set], a number that those on the same media have in common; samples whose number is 0
            stay where they are.
    """
    if not len(order):
        return order
    key = keys[order]
    places = np.argsort(key, kind="stable")
    key = key[places]
    begins = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    within = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    chunks = np.flatnonzero((within % most == 0) | (key == 0))
    # Each chunk stands where its first sample stood.
    stands = np.repeat(places[chunks], np.diff(chunks, append=len(order)))
    return order[places[np.argsort(stands, kind="stable")]]


class BlankedDataset(Dataset[Mapping[str, Any]]):
    """A data set in which the index `-1 - i` is sample i without a label."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index >= 0:
            return self.dataset[index]
        sample = dict(self.dataset[-1 - index])
        sample["labels"] = torch.full_like(torch.as_tensor(sample["labels"]), IGNORE_INDEX)
        return sample


class NumberedDataset(Dataset[Any]):
    """Another data set, whose samples come with the index that they were asked for by."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class NumberedCollator:
    """Another collator, on what `NumberedDataset` gives: its batch also holds `numbers`, the samples' indices."""

    def __init__(self, collator: Callable[[Sequence[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[tuple[int, Any]]) -> dict[str, Any]:
        """The micro-batch."""
        numbers = OnHost({"numbers": tuple(number for number, _ in samples)})
        return {**self.collator([sample for _, sample in samples]), "numbers": numbers}
