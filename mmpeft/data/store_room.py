"""Which entries of a feature store give way to new ones, and when nothing more is taken in.

entries of a store   oldest ............................................... newest
                     not used since this run began | used by it, or by another now
                     give way, one at a time       | stay, however many are to come

An epoch over more than the store holds would else throw out, again and again, what it needs next.
"""

import contextlib
import errno
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mmpeft.core import units

SUFFIX = ".safetensors"

STALE_SECONDS = 3600
"""Age of a temporary file whose writer must be gone."""

_SPARE_BYTES, _SPARE_SHARE = 1 << 30, 20
"""Left free on the disk for what else a run writes: a gibibyte, of small disks a twentieth."""

_RECOUNTS = 16
"""The entries are counted again, for other runs write too, each time that this share of the bound has been added."""


class Room:
    """The bytes that entries take, as far as this process knows.

    Args:
        directory: holds entries in folders of their own.
        limit_bytes: bytes that all may take together.

    Attributes:
        evicted: entries that gave way.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self.limit_bytes = directory, limit_bytes
        self.evicted = 0
        self._began = time.time()
        self._bytes: int | None = None
        self._added = 0
        self._old: deque[tuple[float, int, Path]] = deque()

    def make(self, size: int) -> bool:
        """Whether `size` more bytes may be taken in, once what is old has gone.

        Raises:
            OSError: the disk is full, but for what is left to others; or an old entry cannot be removed.
        """
        if self._bytes is None or self._added > self.limit_bytes // _RECOUNTS:
            self._count()
        assert self._bytes is not None
        while self._bytes + size > self.limit_bytes and self._old:
            used, taken, path = self._old.popleft()
            try:
                if path.stat(follow_symlinks=False).st_mtime > used:
                    continue  # some run has read it since
                path.unlink()
                self.evicted += 1
            except FileNotFoundError:
                pass
            self._bytes -= taken
        if self._bytes + size > self.limit_bytes:
            return False
        if size > (free := self.free()):
            raise OSError(errno.ENOSPC, f"the disk has {units.size(max(0, free))} beside what is left for other files")
        return True

    def add(self, size: int) -> None:
        """Count an entry that has been written."""
        self._bytes = (self._bytes or 0) + size
        self._added += size

    def bytes(self) -> int:
        """What all entries take now, whoever wrote them."""
        return sum(size for _, size, _ in self._entries())

    def _count(self) -> None:
        entries = sorted(self._entries())
        self._bytes, self._added = sum(size for _, size, _ in entries), 0
        self._old = deque(entry for entry in entries if entry[0] < self._began)

    def free(self) -> int:
        """Bytes of the disk that may still be taken; below 0 where less is free than is left for what else is written.

        Raises:
            OSError: the disk cannot be asked.
        """
        place = next((each for each in (self.directory, *self.directory.parents) if each.is_dir()), self.directory)
        disk = shutil.disk_usage(place)
        return disk.free - min(_SPARE_BYTES, disk.total // _SPARE_SHARE)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """(last use, bytes, path) of each entry."""
        for item in self._files():
            with contextlib.suppress(OSError):
                facts = item.stat(follow_symlinks=False)
                if item.name.endswith(SUFFIX):
                    yield facts.st_mtime, facts.st_size, Path(item.path)

    def _files(self) -> Iterator[os.DirEntry[str]]:
        for folder in _listed(self.directory):
            if folder.is_dir(follow_symlinks=False):
                yield from _listed(folder)

    def sweep(self) -> None:
        """Remove what writers that were killed have left."""
        for item in self._files():
            with contextlib.suppress(OSError):
                age = time.time() - item.stat(follow_symlinks=False).st_mtime
                if item.name.endswith(".tmp") and age > STALE_SECONDS:
                    os.unlink(item.path)


def _listed(folder: os.PathLike[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except (FileNotFoundError, NotADirectoryError):
        return []
