"""CSV and TSV: a header, then one row a record; cells that hold a JSON list or object are decoded.

    image,question,answer                line 1
    a.png,"Which digit?                  the record starts in line 2
    Say it in one word.",7               and ends in line 3

A cell that is empty is a key that is not there.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from mmpeft.core.errors import DataError
from mmpeft.data.reading import Located, encoding_error
from mmpeft.data.sources.base import Container, content_digest

SUFFIXES = {".csv": ",", ".tsv": "\t"}
MAX_LINE = 16 << 20
"""Characters of the longest line that is read."""

_DECODED = frozenset(
    ("conversations", "messages", "history", "objects", "boxes", "images", "videos", "audios", "answers", "captions")
)


def table(path: Path) -> Container:
    """The rows of a CSV or TSV file.

    Raises:
        DataError: its first line cannot be read.
    """
    delimiter = _delimiter(path)
    name = {",": "CSV", "\t": "TSV"}.get(delimiter, f"CSV with {delimiter!r} between columns")
    return Container(
        name=name, root=path.parent, rows=lambda: _rows(path, delimiter), digest=lambda: content_digest(path)
    )


def _open(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", newline="")


def _delimiter(path: Path) -> str:
    usual = SUFFIXES[path.suffix.lower()]
    try:
        # Read ahead as it is, the file may hold bytes that are no UTF-8 in later lines.
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = file.readline(1 << 16)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    counts = {mark: header.count(mark) for mark in (usual, ";", "\t", ",")}
    return usual if counts[usual] else max(counts, key=lambda mark: counts[mark])


def _rows(path: Path, delimiter: str) -> Iterator[Located]:
    _long_cells()
    try:
        with _open(path) as file:
            yield from _records(path, csv.reader(_lines(file, path), delimiter=delimiter, strict=True))
    except UnicodeDecodeError as error:
        raise encoding_error(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _long_cells() -> None:
    """Let cells be as long as a row may be (a picture as a `data:` URL); Python's limit is one for the process."""
    if csv.field_size_limit() < MAX_LINE:
        csv.field_size_limit(MAX_LINE)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """The file's lines, none longer than `MAX_LINE`: a file without line ends would be read whole."""
    number = 1
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise DataError(f"{path}:{number}: a line of more than {MAX_LINE} characters; is it a table?")
        yield line
        number += 1


def _records(path: Path, reader: Any) -> Iterator[Located]:
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: is no whole record: {error}; close or double its quotation marks"
            ) from None
        if header is None:
            header = _header(path, record)
        elif record:
            yield _located(record, header, line)
    if header is None:
        raise DataError(f"{path}: the file is empty; expected a line of column names, then one record a line")


def _header(path: Path, record: list[str]) -> list[str]:
    names = [name.strip() for name in record]
    for number, name in enumerate(names):
        if not name and number:
            raise DataError(f"{path}:1: column {number + 1} has no name; name every column in the first line")
        if name and name in names[:number]:
            raise DataError(f"{path}:1: two columns are named {name!r}; rename one of them")
    if not any(names):
        raise DataError(f"{path}:1: found no column name; expected a line of column names, then one record a line")
    return names


def _located(record: list[str], header: list[str], line: int) -> Located:
    if len(record) != len(header):
        fault = f"{len(record)} cells for {len(header)} columns; quote texts that hold the separator"
        return Located(line=line, fault=fault)
    row: dict[str, Any] = {}
    # The first column of pandas' files has no name, and counts the rows.
    for name, cell in zip(header, record, strict=True):
        if not name or cell == "":
            continue
        try:
            row[name] = json.loads(cell) if name in _DECODED and cell[:1] in ("[", "{") else cell
        except (ValueError, RecursionError) as error:
            return Located(line=line, fault=f"the cell under `{name}` is no valid JSON: {error}; correct it")
    return Located(line=line, value=row)
