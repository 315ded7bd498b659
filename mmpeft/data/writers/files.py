"""Rows written to one file: JSON, JSON Lines, CSV, TSV or parquet; all of it or nothing."""

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from mmpeft.core.files import output_error
from mmpeft.core.types import MODALITIES

ROW_GROUP = 1000
"""Rows of a parquet file's row group."""

_STRINGS = pa.list_(pa.string())
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "kind": pa.string(),
        **{f"{modality}s": _STRINGS for modality in MODALITIES},
        "boxes": pa.list_(pa.struct({"values": pa.list_(pa.float64()), "picture": pa.int64()})),
        "box_unit": pa.string(),
        "conversations": pa.list_(pa.struct({"from": pa.string(), "value": pa.string()})),
    }
)
"""The columns of a parquet file: LLaVA's keys, media always as lists."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends without an error.

    Raises:
        OutputError: the place cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One row a line if the name ends in .jsonl, else a JSON array with a row a line."""
    lines = path.suffix.lower() == ".jsonl"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        separator = "" if lines else "[\n"
        for row in rows:
            file.write(separator + json.dumps(row, ensure_ascii=False))
            separator = "\n" if lines else ",\n"
        file.write("\n" if lines else "\n]\n")


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """CSV, or TSV if the name ends in .tsv; lists are written as JSON."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        _write_table(file, rows, columns, "\t" if path.suffix.lower() == ".tsv" else ",")


def _write_table(file: TextIO, rows: Iterable[Mapping[str, Any]], columns: Sequence[str], delimiter: str) -> None:
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerow(columns)
    for row in rows:
        cells = (row.get(name, "") for name in columns)
        writer.writerow([json.dumps(cell, ensure_ascii=False) if isinstance(cell, list) else cell for cell in cells])


def write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """LLaVA rows as parquet, in row groups of `ROW_GROUP`."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
        group: list[dict[str, Any]] = []
        for row in rows:
            group.append(_record(row))
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, SCHEMA))


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    record = dict(row)
    for modality in MODALITIES:
        if modality in record:
            record[f"{modality}s"] = [record.pop(modality)]
    if "boxes" in record:
        boxes = (box if isinstance(box, dict) else {"values": box, "picture": 0} for box in record["boxes"])
        record["boxes"] = list(boxes)
    return record
