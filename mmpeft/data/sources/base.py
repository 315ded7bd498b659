"""What a container of rows is: a file, a folder or a set of files that gives decoded rows."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmpeft.core.errors import DataError
from mmpeft.core.hashing import hash_file
from mmpeft.data.reading import Located

DEFAULT_MOST = 5
"""Names that an error spells out."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """A place that holds rows.

    Attributes:
        name: what reports call it: "JSON Lines".
        root: the folder that its media's names are relative to.
        rows: its rows, each with the line (in tables the row, in archives the sample) where it starts, from 1.
        digest: SHA-256 (hex) of what its rows are made of.
        anchor: what the rows' own names hold of the container's name, so that a renamed copy is another one.
        note: what a report should say beside the name; "" for nothing.
    """

    name: str
    root: Path
    rows: Callable[[], Iterator[Located]]
    digest: Callable[[], str]
    anchor: str = ""
    note: str = ""


def content_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return hash_file(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def listing_digest(paths: Iterable[Path], *, root: Path, read: Iterable[Path] = ()) -> str:
    """SHA-256 (hex) over the names, sizes and times of `paths`, and over the bytes of the files in `read`.

    For sets of files that are too large to be hashed before every run.
    """
    digest = hashlib.sha256()
    for path in paths:
        state = path.stat()
        digest.update(f"{path.relative_to(root)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    for path in read:
        digest.update(f"{path.relative_to(root)}\0{content_digest(path)}\n".encode())
    return digest.hexdigest()


def some(names: Iterable[str], most: int = DEFAULT_MOST) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest
