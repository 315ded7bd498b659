"""Fingerprints of 8 bytes and the tables that find them again: duplicates, leaks, pictures that look alike."""

import hashlib
from array import array
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from PIL import Image

NEAR = 4
"""Bits of 64 in which the difference hashes of two pictures may differ and the pictures still count as alike."""

FLAT = 2.0
"""Standard deviation of grey (0 to 255) up to which a picture has too little detail for a difference hash."""

_BANDS, _BAND_BITS = 4, 16
_LINE_SHIFT = 32


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample stands: its row from 0, its line from 1."""

    index: int
    line: int

    def __str__(self) -> str:
        return f"sample {self.index} in line {self.line}"


def print_of(*parts: str) -> int:
    """64 bits of BLAKE2b of texts, never 0; among a million, two alike by chance once in 30 million files."""
    text = "\x1f".join(parts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


class PlaceTable:
    """The first place of every print, in two flat arrays (16 bytes a slot) instead of a dict (over 150).

    keys    | 0 | 81.. | 0 | 3f.. |     open addressing: a taken slot sends the print on to the next
    places  | - | line << 32 | index | - | ...
    """

    def __init__(self) -> None:
        self.count, self.size = 0, 1 << 10
        self.keys, self.places = array("Q", bytes(8 * self.size)), array("Q", bytes(8 * self.size))

    def first(self, print_: int, place: Place) -> Place | None:
        """Where the print stood before; None, and the place is kept, if it is new."""
        slot = self._slot(print_)
        if self.keys[slot]:
            found = self.places[slot]
            return Place(found & ((1 << _LINE_SHIFT) - 1), found >> _LINE_SHIFT)
        self.keys[slot], self.places[slot] = print_, place.line << _LINE_SHIFT | place.index
        self.count += 1
        if self.count * 3 > self.size * 2:
            self._grow()
        return None

    def get(self, print_: int) -> Place | None:
        """Where the print stands; None if it is not kept."""
        slot = self._slot(print_)
        if not self.keys[slot]:
            return None
        return Place(self.places[slot] & ((1 << _LINE_SHIFT) - 1), self.places[slot] >> _LINE_SHIFT)

    def _slot(self, print_: int) -> int:
        slot = print_ & (self.size - 1)
        while self.keys[slot] and self.keys[slot] != print_:
            slot = (slot + 1) & (self.size - 1)
        return slot

    def _grow(self) -> None:
        keys, places = self.keys, self.places
        self.size *= 2
        self.keys, self.places = array("Q", bytes(8 * self.size)), array("Q", bytes(8 * self.size))
        for key, place in zip(keys, places, strict=True):
            if key:
                slot = self._slot(key)
                self.keys[slot], self.places[slot] = key, place


def difference_hash(image: Image.Image) -> int | None:
    """64 bits, one for each of 8 x 8 places: whether grey rises to the right there; None for a flat picture.

    It survives scaling, another format and a little noise (N. Krawetz, "Kind of Like That", 2013).
    """
    grey = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), dtype=np.int16)
    if grey.std() <= FLAT:
        return None
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


class NearTable:
    """Difference hashes that are found again by any within `near` bits, without comparing all with all.

    Of four bands of 16 bits, at least one differs in `near // 4` bits at most: those bands are looked up.
    """

    def __init__(self, near: int = NEAR) -> None:
        self.near = near
        radius = near // _BANDS
        flips = [0]
        for _ in range(radius):
            flips = sorted({flip ^ (1 << bit) for flip in flips for bit in range(_BAND_BITS)} | set(flips))
        self.flips = flips
        self.hashes, self.names = array("Q"), list[str]()
        self.bands: list[defaultdict[int, array[int]]] = [defaultdict(lambda: array("I")) for _ in range(_BANDS)]

    def add(self, hash_: int, name: str) -> None:
        """Keep a picture's hash under its name."""
        for number, band in enumerate(_bands(hash_)):
            self.bands[number][band].append(len(self.hashes))
        self.hashes.append(hash_)
        self.names.append(name)

    def find(self, hash_: int) -> tuple[str, int] | None:
        """(name, differing bits) of the nearest kept picture, None if none is near."""
        best: tuple[int, int] | None = None
        for number, band in enumerate(_bands(hash_)):
            for flip in self.flips:
                for index in self.bands[number].get(band ^ flip, ()):
                    found = ((self.hashes[index] ^ hash_).bit_count(), index)
                    if found[0] <= self.near and (best is None or found < best):
                        best = found
        return None if best is None else (self.names[best[1]], best[0])


def _bands(hash_: int) -> list[int]:
    return [hash_ >> (_BAND_BITS * number) & ((1 << _BAND_BITS) - 1) for number in range(_BANDS)]
