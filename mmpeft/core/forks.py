"""Processes that begin as copies of this one, as a loader's workers do, in a moment when no thread is half-way in."""

import functools
import os
import sys
import time

_MENDED = (3, 11, 8)
"""The CPython in which a child no longer waits for a lock that a thread of its parent held at the fork."""

_PAUSE_SECONDS = 0.05


@functools.cache
def settle_before_forks() -> None:
    """From now on, let other threads finish before each fork, where a child would wait for them for ever.

    Up to CPython 3.11.7 a child hangs when some native thread was just being made known to Python, as those of gloo and
    HCCL are behind a collective when they let a tensor go (https://github.com/python/cpython/issues/112275). While this
    thread sleeps, they have the interpreter. Safe to call again.
    """
    if sys.version_info < _MENDED and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=functools.partial(time.sleep, _PAUSE_SECONDS))
