"""The pictures of many rows, each file read once, in threads (PIL decodes without the interpreter's lock)."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Literal

from mmpeft.core.errors import DataError
from mmpeft.data.formats import Row
from mmpeft.data.media import MAX_IMAGE_PIXELS, check_image, load_image

Verify = Literal["header", "decode"]
"""How far pictures are read up front: to their size, or to their last pixel."""

Picture = tuple[int, int] | str
"""(width, height) of a readable picture, or why it is not readable."""

_ROWS_AT_ONCE = 1024
_THREADS = min(8, (os.cpu_count() or 1) + 4)


def with_pictures(
    rows: Iterable[Row], read: Callable[[str], Picture]
) -> Iterator[tuple[list[Row], dict[str, Picture]]]:
    """Windows of rows, with what `read` said of each picture so far; every picture is read once, in threads."""
    known: dict[str, Picture] = {}
    remaining = iter(rows)
    with ThreadPoolExecutor(_THREADS) as pool:
        while window := list(islice(remaining, _ROWS_AT_ONCE)):
            names = {name: None for row in window if row.sample for name in row.sample.images if name not in known}
            known.update(zip(names, pool.map(read, names), strict=True))
            yield window, known


def read_picture(verify: Verify, root: Path, name: str, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Picture:
    """The size of a picture inside `root`, read as far as `verify` says, or why it cannot be used."""
    try:
        if verify == "decode":
            return load_image(name, root=root, max_image_pixels=max_image_pixels).size
        return check_image(name, root=root, max_image_pixels=max_image_pixels)
    except DataError as error:
        return str(error)
