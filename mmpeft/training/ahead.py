"""Takes micro-batches out of a loader's workers while the step before computes."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

_CLOSE_SECONDS = 10.0
"""Longer than torch takes to see that a worker has gone."""


class ReadAhead:
    """The batches of one epoch of a loader with workers, fetched by a thread.

        worker   makes 3      makes 4      makes 5
        thread       takes 2      takes 3      takes 4
        step     trains 1     trains 2     trains 3

    Taking a batch costs a connection to its worker for each tensor (torch shares memory by file descriptors), which a
    worker that is making the next samples answers late. With pinned memory torch has a thread of its own for it.

    Args:
        batches: an epoch's iterator; nothing else may ask it until this is closed.
        depth: batches that lie ready at most.
    """

    def __init__(self, batches: Iterator[Any], depth: int) -> None:
        self.batches: Iterator[Any] | None = batches
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()
        self._room, self._depth, self._taken = threading.Semaphore(depth), depth, 0
        self._closed = False
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._fetch, args=(batches,), name="read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._end is None:
            if self._taken == self._depth:
                self.refill()
            batch, self._end = self._ready.get()
            self._taken += 1
        if self._end is not None:
            raise self._end
        return batch

    def refill(self) -> None:
        """Fetch as many batches as were taken; not before a step has all of its own, for the two hinder each other."""
        if self._taken:
            self._room.release(self._taken)
            self._taken = 0

    def close(self) -> None:
        """End the thread once it has what it is waiting for; batches that lie ready are given up.

        A thread whose worker hangs is left to end with the worker.
        """
        self._closed = True
        self._room.release()
        self._thread.join(timeout=_CLOSE_SECONDS)
        self.batches = None

    def _fetch(self, batches: Iterator[Any]) -> None:
        while True:
            self._room.acquire()
            if self._closed:
                return
            try:
                self._ready.put((next(batches), None))
            except StopIteration:
                self._ready.put((None, StopIteration()))
                return
            except BaseException as end:  # the thread that asks raises it
                self._ready.put((None, end))
                return


def taken_ahead(batches: Iterator[Any], before: ReadAhead | None, depth: int) -> ReadAhead | None:
    """What reads `batches` ahead, `before` if it does; None for those that need no thread, or are no loader's own.

    Args:
        before: what read ahead until now; it is closed if it was another epoch's.
    """
    if before is not None:
        if before.batches is batches:
            return before
        before.close()
    plain = isinstance(batches, _MultiProcessingDataLoaderIter) and not batches._pin_memory
    return ReadAhead(batches, depth) if plain else None
