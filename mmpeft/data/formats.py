"""The samples of a data source, whatever its container and layout, checked one by one.

    path  -- sources/  -->  decoded rows  -- layouts/ -->  drafts  -- rows.sample_of -->  samples, or why not
             JSON, CSV, parquet,     LLaVA, messages,
             folder, tar, saved      alpaca, columns

The layout is found out from the first rows (or said by a LLaMA-Factory `dataset_info.json` beside the file), and
is the same for all rows of a source. `describe` tells which it is, and why.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.core.hashing import hash_value
from mmpeft.data.layouts.base import Layout, Options
from mmpeft.data.layouts.dataset_info import NAME, described_by_info
from mmpeft.data.layouts.detect import check_columns, detect_layout, renamed, unknown_layout
from mmpeft.data.layouts.llava import LLAVA
from mmpeft.data.problems import Problem
from mmpeft.data.reading import Located
from mmpeft.data.rows import Row as Row
from mmpeft.data.rows import UnusableError, kind_of, sample_of
from mmpeft.data.sources.base import Container
from mmpeft.data.sources.opening import is_source as is_source
from mmpeft.data.sources.opening import open_container
from mmpeft.data.types import Sample

LOOKED_AT = 100
"""Rows that are looked at to find out a source's layout."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a data source is.

    Attributes:
        path: as it was given.
        container: "JSON Lines", "CSV", "WebDataset" …
        layout: what its rows hold: "LLaVA/ShareGPT" …
        why: what says so.
        root: the folder that its media's names are relative to.
    """

    path: str
    container: str
    layout: str
    why: str
    root: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.layout} in {self.container} ({self.why})"


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the rows of a source are read."""

    container: Container
    layout: Layout
    options: Options
    columns: Mapping[str, str]
    why: str

    def row(self, located: Located, index: int) -> Row:
        return _row(located, index, self.layout, self.options, self.columns)


def describe(path: Path | str, *, columns: Mapping[str, str] | None = None, question: str | None = None) -> Description:
    """What a data source is: its container and layout, and what says so; arguments and errors as `read_rows`."""
    plan = _plan(path, columns, question)
    why = "; ".join(filter(None, (plan.why, plan.container.note)))
    root = str(plan.container.root)
    return Description(path=str(path), container=plan.container.name, layout=plan.layout.name, why=why, root=root)


def source_root(path: Path | str) -> Path:
    """The folder that the names of a source's media are relative to, unless the user gives another.

    Raises:
        DataError: there is no source at `path`.
    """
    return open_container(path).root


def fingerprint(
    path: Path | str, *, columns: Mapping[str, str] | None = None, question: str | None = None
) -> tuple[str, str]:
    """SHA-256 (hex) of what a source's rows are made of, and one of how they are read; as `read_rows` otherwise."""
    plan = _plan(path, columns, question)
    tags = asdict(plan.options.tags)
    manner = [plan.container.name, plan.container.anchor, plan.layout.name, dict(plan.columns), tags, question]
    return plan.container.digest(), hash_value(manner)


def read_rows(
    path: Path | str, *, columns: Mapping[str, str] | None = None, question: str | None = None
) -> Iterator[Row]:
    """Every row of a data source, in order, a problem standing where no sample can be made.

    Args:
        path: a file, a folder, a brace pattern of shards, or `hf://owner/name`.
        columns: the source's own names of columns, by ours: `{"question": "frage"}`.
        question: what the user says where rows hold only a medium and a caption.

    Raises:
        DataError: the source as a whole cannot be read, or its layout is unknown or ambiguous.
    """
    plan = _plan(path, columns, question)
    for index, located in enumerate(plan.container.rows()):
        yield plan.row(located, index)


def read_samples(
    path: Path | str, *, columns: Mapping[str, str] | None = None, question: str | None = None
) -> Iterator[Sample]:
    """The samples of a data source, checked, in order; arguments as `read_rows`.

    Raises:
        DataError: the source cannot be read, or a row is no sample: names file, line, index and the fix.
    """
    for row in read_rows(path, columns=columns, question=question):
        if row.sample is None:
            raise DataError(row.problem.located(Path(path)) if row.problem else f"{path}: unreadable row")
        yield row.sample


def row_parser(
    path: Path | str, *, columns: Mapping[str, str] | None = None, question: str | None = None
) -> Callable[[Located, int], Row]:
    """What makes a `Row` of a decoded JSON row and its index, in the layout of the file that it stands in.

    Raises:
        DataError: as `read_rows`; or the file is not JSON, so that its rows have no form in which to change them.
    """
    plan = _plan(path, columns, question)
    if not plan.container.name.startswith("JSON"):
        raise DataError(
            f"{path}: is {plan.container.name}; expected JSON or JSON Lines: write it so with `mmpeft data convert`"
        )
    return plan.row


def parse_row(
    row: Any,
    *,
    file: Path,
    index: int,
    line: int,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
) -> Sample:
    """One decoded row as a sample, in the layout that its keys tell of; a row that tells of none is read as LLaVA's.

    Raises:
        DataError: the row is no sample: names file, line, index and the fix.
    """
    try:
        detected = detect_layout(renamed(row, columns or {}), columns or {})
    except UnusableError as error:
        raise DataError(Problem(index=index, line=line, id=_name(row), reason=str(error)).located(file)) from None
    layout = detected.layout if detected else LLAVA
    parsed = _row(Located(line=line, value=row), index, layout, Options(question=question), columns or {})
    if parsed.sample is None:
        raise DataError(parsed.problem.located(file) if parsed.problem else f"{file}: unreadable row")
    return parsed.sample


def _plan(path: Path | str, columns: Mapping[str, str] | None, question: str | None) -> _Plan:
    container = open_container(path)
    described = None if columns or not Path(path).is_file() else described_by_info(Path(path))
    if described is not None:
        return _Plan(
            container=container,
            layout=described.layout,
            options=Options(question=question, tags=described.tags),
            columns=described.columns,
            why=f"{NAME} beside it says so, under {described.name}",
        )
    layout, why = _detected(path, container, columns or {})
    return _Plan(container=container, layout=layout, options=Options(question=question), columns=columns or {}, why=why)


def _detected(path: Path | str, container: Container, columns: Mapping[str, str]) -> tuple[Layout, str]:
    """The layout of the first row that tells of one."""
    first: Located | None = None
    for located in itertools.islice(container.rows(), LOOKED_AT):
        if located.fault:
            continue
        try:
            check_columns(columns, located.value)
            detected = detect_layout(renamed(located.value, columns), columns)
        except UnusableError as error:
            raise DataError(f"{path}:{located.line}: {error}") from None
        if detected is not None:
            mapped = ", by the column map" if columns else ""
            return detected.layout, f"{detected.why}{mapped}"
        first = first or located
    if first is not None and (reason := unknown_layout(renamed(first.value, columns))):
        raise DataError(f"{path}:{first.line}: {reason}")
    return LLAVA, "no row tells of another layout"


def _row(located: Located, index: int, layout: Layout, options: Options, columns: Mapping[str, str]) -> Row:
    if located.fault:
        return Row(problem=Problem(index=index, line=located.line, reason=located.fault))
    row = renamed(located.value, columns)
    ignored = tuple(key for key in row if key not in layout.keys) if isinstance(row, dict) else ()
    try:
        if not isinstance(row, dict):
            needed = " and ".join(f"`{key}`" for key in layout.needs)
            raise UnusableError(f"found {kind_of(row)}; expected an object with {needed}")
        if layout.lacks(row) and (other := _other_layout(row)):
            raise UnusableError(f"it is of another layout ({other}) than the rows before ({layout.name}); part the two")
        draft = layout.draft(row, options)
        return Row(sample=sample_of(draft, index=index, line=located.line), ignored=ignored)
    except UnusableError as error:
        problem = Problem(index=index, line=located.line, id=_name(row), reason=str(error))
        return Row(problem=problem, ignored=ignored)


def _other_layout(row: Any) -> str:
    """The name of the layout that a row has by itself, "" if it has none."""
    try:
        detected = detect_layout(row)
    except UnusableError:
        return ""
    return detected.layout.name if detected else ""


def _name(row: Any) -> str:
    """The row's id for a message, whatever else is wrong with the row."""
    value = row.get("id") if isinstance(row, dict) else None
    return str(value).encode("utf-8", "replace").decode() if isinstance(value, str | int) else ""
