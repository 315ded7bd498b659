"""Memory that processes share: what one of them put in, all find, and nothing else."""

import multiprocessing
import os
import pickle
import signal
import time

from hypothesis import given
from hypothesis import strategies as st

from mmpeft.data import shared_table
from mmpeft.data.shared_table import SharedTable

FORK = multiprocessing.get_context("fork")


def key(number):
    return number.to_bytes(16, "little")


def forked(target, *args):
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


@given(st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=60)), max_size=60))
def test_it_holds_what_a_dictionary_holds_that_keeps_the_first(pairs):
    table, expected = SharedTable(1 << 16), {}
    for number, value in pairs:
        # Slots by the first bytes: with a prime among few slots, many keys want the same one.
        name = key(number * 256)
        table.put(name, value)
        expected.setdefault(name, value)
    assert {key(number * 256): table.get(key(number * 256)) for number in range(41)} == {
        key(number * 256): expected.get(key(number * 256)) for number in range(41)
    }
    assert table.refused == 0


def test_it_stops_at_its_size_and_goes_on_answering():
    table = SharedTable(4096)
    for number in range(100):
        table.put(key(number), bytes([number]) * 250)
        assert table.held_bytes <= 4096
    held = [number for number in range(100) if table.get(key(number)) is not None]
    assert 10 <= len(held) < 17
    assert table.refused == 100 - len(held)
    assert all(table.get(key(number)) == bytes([number]) * 250 for number in held)


def test_small_values_cannot_take_the_last_slot():
    table = SharedTable(4096)
    for number in range(40):
        table.put(key(number), b"")
    assert table.get(key(39)) is None
    assert table.get(key(0)) == b""


def _put(table, numbers, start):
    start.wait(30)
    for number in numbers:
        table.put(key(number), str(number).encode() * 20)


def test_many_processes_write_at_once():
    table, start = SharedTable(4 << 20), FORK.Barrier(3)
    # Each number but the first and last is put by two of them.
    processes = [forked(_put, table, range(first, 8000 + first), start) for first in (0, 4000, 8000)]
    for process in processes:
        process.join()
    assert all(not process.exitcode for process in processes)
    assert [table.get(key(number)) for number in range(16000)] == [str(number).encode() * 20 for number in range(16000)]
    assert table.refused == 0


def _hold(table, held):
    table._lock.acquire()
    held.set()
    time.sleep(60)


def test_a_process_killed_while_it_holds_the_table_stops_none(monkeypatch):
    monkeypatch.setattr(shared_table, "_LOCK_SECONDS", 0.2)
    table, held = SharedTable(1 << 16), FORK.Event()
    table.put(key(1), b"one")
    process = forked(_hold, table, held)
    assert held.wait(10)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begin = time.perf_counter()
    for _ in range(100):
        assert table.get(key(1)) is None
        table.put(key(2), b"two")
    assert time.perf_counter() - begin < 2  # it is waited for once


def test_a_spawned_process_gets_an_empty_one():
    table = SharedTable(1 << 16)
    table.put(key(1), b"one")
    copied = pickle.loads(pickle.dumps(table))
    assert copied.get(key(1)) is None
    copied.put(key(1), b"two")
    assert (copied.get(key(1)), table.get(key(1))) == (b"two", b"one")
