import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.batching import BlankedDataset, GlobalBatchSampler, together


def batches(length, micro, accumulation, world, seed=0, epoch=0):
    out = []
    for rank in range(world):
        sampler = GlobalBatchSampler(
            length=length, micro=micro, accumulation=accumulation, world=world, rank=rank, seed=seed
        )
        sampler.set_epoch(epoch)
        out.append(list(sampler))
        assert len(out[-1]) == len(sampler)
    return out


SIZES = st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4)


@given(*SIZES, st.integers(0, 3))
def test_every_process_takes_the_same_number_of_batches_and_no_sample_is_lost_or_repeated(n, micro, acc, world, epoch):
    ranks = batches(n, micro, acc, world, epoch=epoch)
    assert len({len(rank) for rank in ranks}) == 1
    real = [index for rank in ranks for batch in rank for index in batch if index >= 0]
    assert sorted(real) == list(range(n))
    assert all(1 <= len(batch) <= micro for rank in ranks for batch in rank)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_a_step_holds_the_same_samples_on_one_process_and_on_several(n, micro, acc, world):
    """Global batches do not depend on the number of processes."""
    size = micro * acc * world

    def steps(ranks, accumulation):
        count = -(-len(ranks[0]) // accumulation)
        return [
            {i for rank in ranks for batch in rank[s * accumulation : (s + 1) * accumulation] for i in batch if i >= 0}
            for s in range(count)
        ]

    assert steps(batches(n, micro, acc, world), acc) == steps(batches(n, size, 1, 1), 1)


def test_the_order_is_that_of_accelerates_seedable_sampler():
    sampler = SeedableRandomSampler(range(10), data_seed=3)
    sampler.set_epoch(2)
    want = list(sampler)
    (ours,) = batches(10, 10, 1, 1, seed=3, epoch=2)
    assert ours[0] == want


def test_a_blank_has_no_label():
    data = BlankedDataset([{"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}])
    assert data[-1]["labels"].tolist() == [IGNORE_INDEX, IGNORE_INDEX]
    assert data[0]["labels"].tolist() == [1, 2]


def test_samples_on_the_same_media_come_together_up_to_a_micro_batch_of_them():
    keys = {0: "a", 1: "b", 2: "", 3: "a", 4: "b", 5: "a", 6: ""}
    assert together([0, 1, 2, 3, 4, 5, 6], keys.__getitem__, 2) == [0, 3, 1, 4, 2, 5, 6]
    assert together([6, 5, 4, 3, 2, 1, 0], keys.__getitem__, 8) == [6, 5, 3, 0, 4, 1, 2]


def test_bringing_samples_together_loses_none_and_depends_on_no_process_count():
    def order(world):
        samplers = [
            GlobalBatchSampler(
                length=29, micro=4, accumulation=1, world=world, rank=rank, seed=3, media=lambda index: index // 5 + 1
            )
            for rank in range(world)
        ]
        batches = zip(*samplers, strict=True)
        return [index for step in batches for batch in step for index in batch if index >= 0]

    assert sorted(order(1)) == list(range(29))
    assert sorted(order(2)) == list(range(29))
    sampler = GlobalBatchSampler(
        length=29, micro=4, accumulation=1, world=1, rank=0, seed=3, media=lambda index: index // 5 + 1
    )
    assert len({index // 5 for index in next(iter(sampler))}) == 1
