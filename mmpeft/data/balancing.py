"""Steps cut by what their samples cost, the same on any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from mmpeft.data.batching import TOGETHER, shuffled, together
from mmpeft.data.cutting import Bounds, CostModel, Item, MicroBatch, count_micro_batches, cut, items_of
from mmpeft.data.sample_lengths import Lengths


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Which samples each step has; it depends on nothing but the samples, so a run may go on with other micro-batches.

    The order is that of `GlobalBatchSampler`: a permutation by seed and epoch, samples on the same media together.
    With `longest_first`, two things are moved in the first epoch, and the rest stays as it was shuffled:

        steps of two    3 9 | 2 2 | 7 6 | 4         the longest sample goes into the step with most tokens
                        3 6 | 2 2 | 7 9 | 4         (that with fewer samples aside), in the place of its shortest,
                        7 9 | 3 6 | 2 2 | 4         and that step to the front

    So memory that does not suffice shows at the first step: however a step is cut, it is there that most stands in a
    micro-batch, or close to it.

    Args:
        lengths: of the samples that an epoch has, given its number from 0.
        samples: of an epoch.
        size: samples of a step.
        seed: of the shuffle; the epoch is added to it.
        shuffle: False takes samples in the order of the data set.
        share_media: bring samples on the same media together.
        longest_first: see above.
    """

    lengths: Callable[[int], Lengths]
    samples: int
    size: int
    seed: int
    shuffle: bool = True
    share_media: bool = False
    longest_first: bool = True

    def __len__(self) -> int:
        return -(-self.samples // self.size)

    def of(self, epoch: int) -> Iterator[list[int]]:
        """The samples of each step of an epoch (from 0), one step at a time."""
        lengths = self.lengths(epoch)
        order = shuffled(self.samples, self.seed + epoch) if self.shuffle else np.arange(self.samples)
        if self.share_media:
            order = together(order, lengths["picture"], TOGETHER)
        if epoch == 0 and self.shuffle and self.longest_first and self.samples > self.size:
            order = _longest_first(order, np.asarray(lengths["tokens"]), self.size)
        for start in range(0, self.samples, self.size):
            yield order[start : start + self.size].tolist()


def _longest_first(ordered: np.ndarray, tokens: np.ndarray, size: int) -> np.ndarray:
    whole = len(ordered) // size * size
    step = int(tokens[ordered[:whole]].reshape(-1, size).sum(axis=1, dtype=np.int64).argmax())
    places = np.arange(step * size, (step + 1) * size)
    longest = int(tokens[ordered].argmax())
    if not places[0] <= longest <= places[-1]:
        shortest = int(places[tokens[ordered[places]].argmin()])
        ordered[[longest, shortest]] = ordered[[shortest, longest]]
    return np.concatenate([ordered[places], np.delete(ordered, places)])


def fullest_step(steps: Steps, bounds: Bounds, costs: CostModel, epochs: int) -> int:
    """Micro-batches of one process that suffice for every step of so many epochs."""
    most = 1
    for epoch in range(epochs):
        lengths = steps.lengths(epoch)
        for step in steps.of(epoch):
            most = max(most, count_micro_batches(items_of(lengths[step]), bounds, costs))
    return most


@dataclass(kw_only=True)
class CutFigures:
    """What cutting by cost spared against cutting the same steps in their order, of all processes.

    Attributes:
        steps: how many were cut.
        tokens, padding: of the samples, and what padded batches hold beside them.
        plain_padding: what they would hold in the order of the step; both are 0 of rows.
        dearest, mean: cost of the process that has most to do, and of one on average; on one process, of its
            micro-batches. Their quotient is how uneven the steps are.
        plain_dearest, plain_mean: the same in the order of the step.
        largest, plain_largest: tokens of the largest micro-batch, cut by cost and in the order of the step.
    """

    steps: int = 0
    tokens: int = 0
    padding: int = 0
    plain_padding: int = 0
    dearest: float = 0.0
    mean: float = 0.0
    plain_dearest: float = 0.0
    plain_mean: float = 0.0
    largest: int = 0
    plain_largest: int = 0

    def add(self, items: Sequence[Item], shares: Sequence[Sequence[MicroBatch]], *, plain: bool) -> None:
        """Count a step: for each process its micro-batches, as they were cut, or in the order of the step."""
        tokens = sum(item.tokens for item in items)
        batches = [batch for share in shares for batch in share]
        costs = [sum(batch.cost for batch in share) for share in shares]
        if len(costs) == 1:
            costs = [batch.cost for batch in batches]
        computed = sum(batch.tokens for batch in batches)
        padding = 0 if batches[0].bounds.packed else computed - tokens
        largest = max(batch.tokens for batch in batches)
        if plain:
            self.plain_padding += padding
            self.plain_largest = max(self.plain_largest, largest)
            self.plain_dearest, self.plain_mean = (
                self.plain_dearest + max(costs),
                self.plain_mean + sum(costs) / len(costs),
            )
            return
        self.largest = max(self.largest, largest)
        self.steps, self.tokens, self.padding = self.steps + 1, self.tokens + tokens, self.padding + padding
        self.dearest, self.mean = self.dearest + max(costs), self.mean + sum(costs) / len(costs)

    @property
    def imbalance(self) -> float:
        """The dearest by the mean; 1 where all are alike."""
        return self.dearest / (self.mean or 1)

    @property
    def plain_imbalance(self) -> float:
        """The same in the order of the step."""
        return self.plain_dearest / (self.plain_mean or 1)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the steps of a stage are cut by cost: what `CostBatchSampler` takes.

    Attributes:
        steps: which samples each step has.
        bounds, costs: what a micro-batch may hold, and what it costs.
        accumulation: micro-batches of one process in a step.
    """

    steps: Steps
    bounds: Bounds
    costs: CostModel
    accumulation: int


class CostBatchSampler(Sampler[list[int]]):
    """Micro-batches of one process, cut by cost from steps that do not depend on how many processes there are.

    Micro-batches, the dearest first, are dealt out to and fro, so that all processes have about as much to do:

        cost         9 8 7 6 5 4            process 0   9 6 5
                                            process 1   8 7 4

    Every process has `accumulation` micro-batches a step. Where samples are too few for that, one is a blank: the
    index `-1 - i`, which `BlankedDataset` returns with no label.

    Args:
        plan: what is cut, and how; its `accumulation` is `fullest_step` by processes at least.
        world, rank: number of processes, and which one this is.

    Attributes:
        figures: of the epochs that were cut; counted by the first process alone, for they are of all.
    """

    def __init__(self, plan: Cut, *, world: int, rank: int) -> None:
        self.steps, self.bounds, self.costs, self.accumulation = plan.steps, plan.bounds, plan.costs, plan.accumulation
        self.world, self.rank, self.epoch = world, rank, 0
        self.figures = CutFigures()

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as epoch `epoch` (from 0) does."""
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.steps.samples, self.steps.size)
        return whole * self.accumulation + (self._micro_batches(rest) if rest else 0)

    def _micro_batches(self, samples: int) -> int:
        """Micro-batches of one process in a step of so many samples."""
        if self.bounds.samples is None:
            return self.accumulation
        return -(-samples // (self.bounds.samples * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        lengths = self.steps.lengths(self.epoch)
        for step in self.steps.of(self.epoch):
            items = items_of(lengths[step])
            rounds = self._micro_batches(len(step))
            batches = cut(items, rounds * self.world, self.bounds, self.costs)
            if self.rank == 0:
                self._count(items, batches, rounds)
            blank = -1 - step[min(items, key=lambda item: (item.tokens, item.place)).place]
            for place in _dealt(rounds, self.world, self.rank):
                yield [step[sample] for sample in batches[place]] or [blank]

    def _count(self, items: Sequence[Item], batches: Sequence[Sequence[int]], rounds: int) -> None:
        dealt = [[batches[place] for place in _dealt(rounds, self.world, rank)] for rank in range(self.world)]
        self.figures.add(items, [[self._of(items, batch) for batch in share] for share in dealt], plain=False)
        micro = -(-len(items) // (rounds * self.world))
        chunks = [range(start, min(start + micro, len(items))) for start in range(0, len(items), micro)]
        plain = [[self._of(items, chunk) for chunk in chunks[rank :: self.world]] for rank in range(self.world)]
        self.figures.add(items, plain, plain=True)

    def _of(self, items: Sequence[Item], places: Sequence[int]) -> MicroBatch:
        batch = MicroBatch(self.bounds, self.costs)
        for place in places:
            batch.put([items[place]])
        return batch


def _dealt(rounds: int, world: int, rank: int) -> list[int]:
    """Which of the micro-batches, the dearest first, a process has."""
    return [turn * world + (rank if turn % 2 == 0 else world - 1 - rank) for turn in range(rounds)]
