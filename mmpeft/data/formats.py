"""The samples of a data file, whatever its layout, checked one by one.

A container (mmpeft.data.reading) gives decoded rows with their lines, a layout (mmpeft.data.layouts) says what a
row holds, and mmpeft.data.rows makes a checked sample of it or says why it is none.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.data.layouts.base import Layout, Options
from mmpeft.data.layouts.llava import LLAVA
from mmpeft.data.problems import Problem
from mmpeft.data.reading import Located, read_objects
from mmpeft.data.rows import Row as Row
from mmpeft.data.rows import UnusableError, kind_of, sample_of
from mmpeft.data.types import Sample


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a data file, in order, a problem standing where no sample can be made.

    Raises:
        DataError: the file as a whole cannot be read (see `read_objects`).
    """
    for index, located in enumerate(read_objects(path)):
        yield _row(located, index, LLAVA, Options())


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a data file, checked, in order.

    Raises:
        DataError: the file cannot be read, or a row is no sample: names file, line, index and the fix.
    """
    for row in read_rows(path):
        if row.sample is None:
            raise DataError(row.problem.located(path) if row.problem else f"{path}: unreadable row")
        yield row.sample


def parse_row(row: Any, *, file: Path, index: int, line: int) -> Sample:
    """One decoded JSON row as a sample.

    Raises:
        DataError: the row is no sample: names file, line, index and the fix.
    """
    parsed = _row(Located(line=line, value=row), index, LLAVA, Options())
    if parsed.sample is None:
        raise DataError(parsed.problem.located(file) if parsed.problem else f"{file}: unreadable row")
    return parsed.sample


def _row(located: Located, index: int, layout: Layout, options: Options) -> Row:
    row = located.value
    if located.fault:
        return Row(problem=Problem(index=index, line=located.line, reason=located.fault))
    ignored = tuple(key for key in row if key not in layout.keys) if isinstance(row, dict) else ()
    try:
        if not isinstance(row, dict):
            needed = " and ".join(f"`{key}`" for key in layout.needs)
            raise UnusableError(f"found {kind_of(row)}; expected an object with {needed}")
        draft = layout.draft(row, options)
        return Row(sample=sample_of(draft, index=index, line=located.line), ignored=ignored)
    except UnusableError as error:
        problem = Problem(index=index, line=located.line, id=_name(row), reason=str(error))
        return Row(problem=problem, ignored=ignored)


def _name(row: Any) -> str:
    """The row's id for a message, whatever else is wrong with the row."""
    value = row.get("id") if isinstance(row, dict) else None
    return str(value).encode("utf-8", "replace").decode() if isinstance(value, str | int) else ""
