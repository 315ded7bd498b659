"""Processes that wait for the first of them, however long it takes."""

import contextlib
import datetime
from collections.abc import Iterator

from accelerate import PartialState
from torch import distributed

LONGEST = datetime.timedelta(days=7)


@contextlib.contextmanager
def without_hurry() -> Iterator[None]:
    """Processes leave the block together, whenever the last of them comes to its end.

    Their own limit for waiting, by default ten minutes (NCCL) or half an hour (gloo), is there to find one that
    hangs; here one works, such as on an upload. They wait over gloo, for it needs no device. One that raises does not
    wait: the others then find its connection closed.
    """
    if PartialState().num_processes == 1:
        yield
        return
    group = distributed.new_group(backend="gloo", timeout=LONGEST)
    yield
    distributed.barrier(group=group)
    distributed.destroy_process_group(group)
