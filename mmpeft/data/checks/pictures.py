"""The pictures of many rows, decoded in threads once each; of each only its size and two prints stay."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mmpeft.core.errors import DataError
from mmpeft.data.checks.prints import difference_hash, print_of
from mmpeft.data.formats import Row
from mmpeft.data.media import load_image

ROWS_AT_ONCE = 256
"""Rows whose pictures are decoded side by side."""


class Seen(NamedTuple):
    """What is kept of a picture: pixels a side, a print of its pixels, its difference hash (None if flat)."""

    width: int
    height: int
    pixels: int
    look: int | None


class Pictures:
    """Reads pictures below `root`; PIL decodes without the interpreter's lock, so threads suffice."""

    def __init__(self, root: Path, *, workers: int | None = None) -> None:
        self.root, self.workers = root, workers or min(8, os.cpu_count() or 1)
        self.slots: dict[int, int] = {}
        self.sides, self.pixels, self.looks = array("I"), array("Q"), array("Q")
        self.flat: set[int] = set()
        self.faults: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.slots)

    def windows(self, rows: Iterable[Row], *, opened: bool) -> Iterator[tuple[list[Row], list[str]]]:
        """Windows of rows, each with the names of the pictures that were read for it first."""
        remaining = iter(rows)
        with ThreadPoolExecutor(self.workers) as pool:
            while window := list(islice(remaining, ROWS_AT_ONCE)):
                names = self._new(window) if opened else []
                for name, found in zip(names, pool.map(self._read, names), strict=True):
                    self._keep(print_of(name), found)
                yield window, names

    def get(self, name: str) -> Seen | str | None:
        """What is known of a picture, why it is not readable, or None if it was not opened."""
        key = print_of(name)
        if key in self.faults:
            return self.faults[key]
        slot = self.slots.get(key)
        if slot is None:
            return None
        look = None if slot in self.flat else self.looks[slot]
        return Seen(self.sides[2 * slot], self.sides[2 * slot + 1], self.pixels[slot], look)

    def sizes(self, names: Sequence[str]) -> list[tuple[int, int]]:
        """(width, height) of the readable ones among `names`."""
        found = [self.get(name) for name in names]
        return [(seen.width, seen.height) for seen in found if isinstance(seen, Seen)]

    def _new(self, window: Sequence[Row]) -> list[str]:
        names = dict.fromkeys(name for row in window if row.sample for name in row.sample.images)
        return [name for name in names if self.get(name) is None]

    def _read(self, name: str) -> Seen | str:
        try:
            image = load_image(name, root=self.root)
        except DataError as error:
            return str(error)
        digest = hashlib.blake2b(image.tobytes(), digest_size=8, key=b"%dx%d" % image.size).digest()
        return Seen(image.width, image.height, int.from_bytes(digest, "little"), difference_hash(image))

    def _keep(self, key: int, found: Seen | str) -> None:
        if isinstance(found, str):
            self.faults[key] = found
            return
        slot = self.slots[key] = len(self.slots)
        self.sides.extend((found.width, found.height))
        self.pixels.append(found.pixels)
        self.looks.append(found.look or 0)
        if found.look is None:
            self.flat.add(slot)
