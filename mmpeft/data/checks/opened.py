"""The media of many rows, decoded in threads once each; of each only sizes, prints and notes stay."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data.checks.prints import difference_hash, print_of
from mmpeft.data.formats import Row
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.media import Note, load_with_notes
from mmpeft.data.pictures import Film, Medium, Recording, media_names, read_medium, windows_of
from mmpeft.data.types import Sample

ROWS_AT_ONCE = 256
"""Rows whose media are decoded side by side."""

_BAND_PIXELS = 1 << 20


class Seen(NamedTuple):
    """What is kept of a picture: pixels a side, a print of its pixels, its difference hash (None if flat)."""

    width: int
    height: int
    pixels: int
    look: int | None


Found = Seen | Film | Recording | str
"""What is known of a medium, or why it cannot be used."""


class Opened:
    """Reads media below `root`; PIL and ffmpeg decode without the interpreter's lock, so threads suffice.

    Attributes:
        counts: how many media of each modality could be read.
    """

    def __init__(self, root: Path, *, limits: MediaLimits | None = None, workers: int | None = None) -> None:
        self.root, self.limits = root, limits or MediaLimits()
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.slots: dict[int, int] = {}
        self.sides, self.pixels, self.looks = array("I"), array("Q"), array("Q")
        self.flat: set[int] = set()
        self.others: dict[int, Film | Recording | str] = {}
        self.unsaid: dict[int, tuple[Note, ...]] = {}
        self.counts = {"image": 0, "video": 0, "audio": 0}

    def windows(self, rows: Iterable[Row], *, opened: bool) -> Iterator[tuple[list[Row], list[Medium]]]:
        """Windows of rows, each with the media that were read for it first."""
        with ThreadPoolExecutor(self.workers) as pool:
            for window in windows_of(rows, ROWS_AT_ONCE):
                media = self._new(window) if opened else []
                for medium, (found, notes) in zip(media, pool.map(self._read, media), strict=True):
                    self._keep(medium, found, notes)
                yield window, media

    def get(self, medium: Medium) -> Found | None:
        """What is known of a medium, why it is not readable, or None if it was not opened."""
        key = print_of(*medium)
        if key in self.others:
            return self.others[key]
        slot = self.slots.get(key)
        if slot is None:
            return None
        look = None if slot in self.flat else self.looks[slot]
        return Seen(self.sides[2 * slot], self.sides[2 * slot + 1], self.pixels[slot], look)

    def of(self, sample: Sample) -> list[Found | None]:
        """What is known of a sample's media, pictures first, then films, then recordings."""
        return [self.get(medium) for medium in media_names(sample)]

    def notes(self, sample: Sample) -> list[Note]:
        """What was left out of a sample's pictures, each picture's notes once in a file."""
        if not self.unsaid:
            return []
        return [note for name in sample.images for note in self.unsaid.pop(print_of("image", name), ())]

    def _new(self, window: Sequence[Row]) -> list[Medium]:
        media = dict.fromkeys(medium for row in window if row.sample for medium in media_names(row.sample))
        return [medium for medium in media if self.get(medium) is None]

    def _read(self, medium: Medium) -> tuple[Found, tuple[Note, ...]]:
        modality, name = medium
        if modality != "image":
            found = read_medium("decode", self.root, self.limits, medium)
            assert isinstance(found, Film | Recording | str)
            return found, ()
        try:
            image, notes = load_with_notes(name, root=self.root, max_image_pixels=self.limits.max_image_pixels)
        except DataError as error:
            return str(error), ()
        return Seen(image.width, image.height, _pixels_print(image), difference_hash(image)), notes

    def _keep(self, medium: Medium, found: Found, notes: tuple[Note, ...]) -> None:
        key = print_of(*medium)
        if notes:
            self.unsaid[key] = notes
        if not isinstance(found, str):
            self.counts[medium[0]] += 1
        if not isinstance(found, Seen):
            self.others[key] = found
            return
        slot = self.slots[key] = len(self.slots)
        self.sides.extend((found.width, found.height))
        self.pixels.append(found.pixels)
        self.looks.append(found.look or 0)
        if found.look is None:
            self.flat.add(slot)


def _pixels_print(image: Image.Image) -> int:
    """64 bits of BLAKE2b of a picture's size and pixels, in bands: the bytes of a large one are not held twice."""
    digest = hashlib.blake2b(digest_size=8, key=b"%dx%d" % image.size)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return int.from_bytes(digest.digest(), "little")
