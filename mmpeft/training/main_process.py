"""What one process finds out for all of them."""

from collections.abc import Callable
from typing import TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

_Found = TypeVar("_Found")


def on_main(find: Callable[[], _Found]) -> _Found:
    """What the main process finds, on all of them; each has to ask.

    Looking once is enough, others may see another disk, and no two race to remove the same file.
    """
    [found] = broadcast_object_list([find() if PartialState().is_main_process else None])
    return cast(_Found, found)
