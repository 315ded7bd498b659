"""Batches fetched while a step computes: the same ones in the same order, with the errors of the loader."""

import threading
import time

import pytest
from torch.utils.data import DataLoader

from mmpeft.training.ahead import ReadAhead, taken_ahead


class Numbers:
    def __init__(self, count, broken=None):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index == self.broken:
            raise ValueError(f"sample {index}")
        return index


def loader(count=9, broken=None, **options):
    options = {"num_workers": 1, **options}
    return DataLoader(Numbers(count, broken), batch_size=2, collate_fn=list, **options)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_every_batch_comes_in_order_in_each_epoch():
    numbers = loader(persistent_workers=True)
    for _ in range(3):
        ahead = ReadAhead(iter(numbers), 2)
        assert list(ahead) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
        assert list(ahead) == []
        ahead.close()
    assert threads() == []


def test_no_more_is_taken_than_asked_for_and_it_lies_ready():
    taken = []
    ahead = ReadAhead(iter(taken.append(number) or number for number in range(9)), 2)
    time.sleep(0.2)
    assert taken == [0, 1]
    assert next(ahead) == 0
    time.sleep(0.2)
    assert taken == [0, 1]
    ahead.refill()
    time.sleep(0.2)
    assert taken == [0, 1, 2]
    ahead.close()
    assert taken == [0, 1, 2]
    assert threads() == []


def test_an_error_comes_where_its_batch_would_with_its_own_traceback():
    ahead = ReadAhead(iter(loader(broken=3)), 4)
    assert next(ahead) == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 3"):
            next(ahead)
    ahead.close()


def test_another_epoch_closes_the_one_before_and_other_iterators_are_left_alone():
    numbers = loader()
    first = iter(numbers)
    ahead = taken_ahead(first, None, 1)
    assert taken_ahead(first, ahead, 1) is ahead
    other = taken_ahead(iter(numbers), ahead, 1)
    assert other is not ahead
    assert len(threads()) == 1
    assert taken_ahead(iter(loader(num_workers=0)), other, 1) is None
    assert threads() == []
