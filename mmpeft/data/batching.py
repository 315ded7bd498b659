"""Which samples share a step, the same on any number of processes."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from mmpeft.core.types import IGNORE_INDEX


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

    With `media`, samples on the same media come together, up to a micro-batch of them: the first of them in the
    shuffled order takes the others with it, and the order is otherwise what it was.

    Args:
        length: samples in the data set.
        micro: samples of one process that go through the model at once.
        accumulation: micro-batches of one process in a step.
        world, rank: number of processes, and which one this is.
        seed: of the shuffle; the epoch is added to it.
        media: the media of sample i, for all i, as this epoch has them.
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
        media: Callable[[int], Hashable] | None = None,
    ) -> None:
        self.length, self.micro, self.accumulation = length, micro, accumulation
        self.world, self.rank, self.seed, self.epoch = world, rank, seed, 0
        self.media = media

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as epoch `epoch` (from 0) does."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.micro * self.accumulation * self.world)
        return whole * self.accumulation + -(-rest // (self.micro * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        if self.media is not None:
            order = together(order, self.media, self.micro)
        width = self.micro * self.world
        for start in range(0, self.length, width):
            chunk = order[start : start + width]
            share, extra = divmod(len(chunk), self.world)
            begin = self.rank * share + min(self.rank, extra)
            mine = chunk[begin : begin + share + (self.rank < extra)]
            yield mine or [-1 - chunk[0]]


def together(order: Sequence[int], media: Callable[[int], Hashable], most: int) -> list[int]:
    """The order with samples on the same media side by side, `most` of them at once.

    order   a1 b1 c1 a2 b2 a3      most 2   ->   a1 a2 b1 b2 c1 a3

    Samples whose media are empty stay where they are.
    """
    places: dict[Hashable, list[int]] = {}
    for sample in order:
        key = media(sample)
        places.setdefault(key or ("alone", sample), []).append(sample)
    chunks = [samples[start : start + most] for samples in places.values() for start in range(0, len(samples), most)]
    rank = {sample: place for place, sample in enumerate(order)}
    return [sample for chunk in sorted(chunks, key=lambda chunk: rank[chunk[0]]) for sample in chunk]


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
