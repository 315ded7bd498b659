"""A table in memory that forked processes share: what one puts in, all find. It only grows, up to its size.

    head     where the next record begins, entries, and how often there was no room
    slots    key (16 bytes), where its record begins (8)          0 -> free; the next slot is looked at
    records  length (4), value                                    one behind the other

The memory belongs to no file: the system gives it as it is written, and takes it back with the last process.
"""

import mmap
import multiprocessing
import struct
from typing import Any

KEY_BYTES = 16

_HEAD = struct.Struct("<QQQ")
_SLOT = struct.Struct(f"<{KEY_BYTES}sQ")
_LENGTH = struct.Struct("<I")

_BYTES_A_SLOT = 256
"""Of the table's size for one slot: less than a record with its slot takes, so that room ends before slots do."""

_LOCK_SECONDS = 5.0


class SharedTable:
    """Values by key, for this process and all that it forks from now on; a spawned one begins with an empty table.

    A process that is killed while it holds the table takes the lock with it: the others stop using it then.

    Args:
        size: bytes, all included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._slots = max(1, size // _BYTES_A_SLOT)
        self._first = _HEAD.size + self._slots * _SLOT.size
        self._memory = mmap.mmap(-1, max(size, self._first))
        self._lock = multiprocessing.Lock()
        self._usable = True
        self._write_head(self._first, 0, 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedTable, (self.size,)

    @property
    def held_bytes(self) -> int:
        """Bytes that records and their slots take."""
        used, entries, _ = self._head()
        return used - self._first + entries * _SLOT.size

    @property
    def refused(self) -> int:
        """How often there was no room."""
        return self._head()[2]

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None if it has none."""
        if not self._taken():
            return None
        try:
            _, place = self._find(key)
            if not place:
                return None
            (length,) = _LENGTH.unpack_from(self._memory, place)
            begin = place + _LENGTH.size
            return self._memory[begin : begin + length]
        finally:
            self._lock.release()

    def put(self, key: bytes, value: bytes) -> None:
        """Keep a value, unless there is one already or no room is left."""
        if not self._taken():
            return
        try:
            slot, place = self._find(key)
            if place:
                return
            used, entries, refused = self._head()
            end = used + _LENGTH.size + len(value)
            # One slot stays free, so that looking for a key ends.
            if end > self.size or entries + 1 >= self._slots:
                self._write_head(used, entries, refused + 1)
                return
            _LENGTH.pack_into(self._memory, used, len(value))
            self._memory[used + _LENGTH.size : end] = value
            _SLOT.pack_into(self._memory, slot, key, used)
            self._write_head(end, entries + 1, refused)
        finally:
            self._lock.release()

    def _taken(self) -> bool:
        self._usable = self._usable and self._lock.acquire(timeout=_LOCK_SECONDS)
        return self._usable

    def _find(self, key: bytes) -> tuple[int, int]:
        """Where a key's slot is, or could be, and where its record begins (0: nowhere)."""
        number = int.from_bytes(key[:8], "little") % self._slots
        while True:
            slot = _HEAD.size + number * _SLOT.size
            found, place = _SLOT.unpack_from(self._memory, slot)
            if not place or found == key:
                return slot, place
            number = (number + 1) % self._slots

    def _head(self) -> tuple[int, int, int]:
        used, entries, refused = _HEAD.unpack_from(self._memory, 0)
        return used, entries, refused

    def _write_head(self, used: int, entries: int, refused: int) -> None:
        _HEAD.pack_into(self._memory, 0, used, entries, refused)
