import tracemalloc

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.batching import BlankedDataset, GlobalBatchSampler, MediaInEach, together


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
    keys = np.array([1, 2, 0, 1, 2, 1, 0])
    assert together(np.arange(7), keys, 2).tolist() == [0, 3, 1, 4, 2, 5, 6]
    assert together(np.arange(7)[::-1], keys, 8).tolist() == [6, 5, 3, 0, 4, 1, 2]
    assert together(np.arange(0), keys, 8).tolist() == []


@given(st.lists(st.integers(0, 5)), st.integers(1, 4), st.randoms())
def test_bringing_samples_together_moves_chunks_to_where_their_first_sample_stands(keys, most, random):
    order = random.sample(range(len(keys)), len(keys))
    chunks = []
    for sample in order:
        fitting = [chunk for chunk in chunks if keys[sample] and keys[chunk[0]] == keys[sample] and len(chunk) < most]
        if fitting:
            fitting[0].append(sample)
        else:
            chunks.append([sample])
    expected = [sample for chunk in chunks for sample in chunk]
    assert together(np.array(order, dtype=int), np.array(keys, dtype=int), most).tolist() == expected


def test_an_epoch_takes_eight_bytes_a_sample_whatever_the_number_of_processes():
    def most(**options):
        sampler = GlobalBatchSampler(length=1_000_000, micro=4, accumulation=1, world=10_000, rank=7, seed=0, **options)
        tracemalloc.start()
        try:
            assert sum(len(batch) for batch in sampler) == 100
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    # Torch's own 8 MB are not traced; a list of numbers would be 36 MB.
    assert most() < 1e6
    assert most(shuffle=False) < 9e6


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


def test_each_micro_batch_has_a_blank_of_the_media_that_it_lacks():
    class Batches:
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 4

        def __iter__(self):
            return iter([[0, 1], [2], [3, 0], [-1 - 2]])

    pictures, recordings = 1, 4
    kinds = {0: 0, 1: 0, 2: pictures, 3: pictures | recordings}
    filled = MediaInEach(Batches(), kinds.__getitem__, 4)
    filled.set_epoch(3)
    assert filled.batches.epoch == 3
    assert len(filled) == 4
    assert list(filled) == [[0, 1, -3, -4], [2, -4], [3, 0], [-3, -4]]
