"""Where the rows of a JSON Lines file lie, found without decoding them, and one row read from there."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmpeft.core.errors import DataError
from mmpeft.data.reading import MAX_ROW, Located, decode_line

CHUNK = 1 << 20
"""Bytes read at a time."""


class LineAt(NamedTuple):
    """A row of a JSON Lines file.

    Attributes:
        number: its place among the rows, from 0; blank lines are none.
        line: its line, from 1.
        start, length: where its bytes lie, the line's end not counted.
    """

    number: int
    line: int
    start: int
    length: int


def line_places(path: Path) -> Iterator[LineAt]:
    """All rows of a file, in order; holds one chunk of it at a time.

    Raises:
        DataError: the file cannot be read.
    """
    number, line, begin, read, blank = 0, 1, 0, 0, True
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                position = 0
                if not read and chunk.startswith(codecs.BOM_UTF8):
                    position = begin = len(codecs.BOM_UTF8)
                while (end := chunk.find(b"\n", position)) >= 0:
                    if not (blank and _is_space(chunk, position, end)):
                        yield LineAt(number, line, begin, read + end - begin)
                        number += 1
                    line, begin, position, blank = line + 1, read + end + 1, end + 1, True
                blank = blank and _is_space(chunk, position, len(chunk))
                read += len(chunk)
        if not blank:
            yield LineAt(number, line, begin, read - begin)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _is_space(chunk: bytes, start: int, end: int) -> bool:
    # Most lines are told by their first byte; only others are copied.
    return start == end or (chunk[start] in b" \t\r" and chunk[start:end].isspace())


def read_line(path: Path, place: LineAt) -> Located:
    """The decoded value of a row; a fault where it is none.

    Raises:
        DataError: the file cannot be read, or has become shorter.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.start)
            raw = file.read(min(place.length, 4 * MAX_ROW) + 1)
    except OSError as error:
        raise DataError(f"{path}:{place.line}: cannot be read: {error.strerror or error}") from error
    if len(raw) < min(place.length, 4 * MAX_ROW):
        raise DataError(f"{path}:{place.line}: the file has become shorter while it was read; start again")
    return decode_line(raw[: place.length] + (b"\n" if len(raw) > place.length else b""), place.line)
