"""Parquet files, and the Arrow files of `datasets`: rows of columns, media among them as bytes.

A cell of embedded bytes (`{"bytes": …, "path": …}`, or plain binary) becomes the name under which the bytes are
found again, so that a row stays small:

    row 17 of train.parquet    {"image": {"bytes": b"…", "path": "a.png"}, "question": "Which digit?"}
    what is read of it         {"image": "train.parquet::image[17]", "question": "Which digit?"}

Class labels are read as their names.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from mmpeft.core.errors import DataError
from mmpeft.data.embedded import MEMBER, check_row_group
from mmpeft.data.reading import Located
from mmpeft.data.sources.base import Container, content_digest, listing_digest

BATCH = 64
"""Rows that are in memory at a time."""


def parquet_file(path: Path) -> Container:
    """The rows of one parquet file."""
    return Container(
        name="parquet",
        root=path.parent,
        rows=lambda: columnar_rows([path], root=path.parent),
        digest=lambda: content_digest(path),
        anchor=path.name,
    )


def parquet_files(paths: Sequence[Path], root: Path) -> Container:
    """The rows of several parquet files below `root`, in order."""
    return Container(
        name=f"{len(paths)} parquet files",
        root=root,
        rows=lambda: columnar_rows(paths, root=root),
        digest=lambda: listing_digest(paths, root=root),
        anchor=root.name,
    )


def columnar_rows(paths: Sequence[Path], *, root: Path, features: datasets.Features | None = None) -> Iterator[Located]:
    """The rows of parquet or Arrow stream files, one after another; lines count rows, from 1, over all of them.

    Args:
        paths: the files, below `root`.
        root: the folder that names of embedded media are relative to.
        features: what the columns mean; default: as the file's own metadata say.

    Raises:
        DataError: a file is damaged, or no parquet or Arrow file.
    """
    count = 0
    for path in paths:
        name = path.relative_to(root).as_posix()
        start = count
        try:
            schema, batches = _opened(path)
            labels = _labels(features or _features(schema))
            for batch in batches:
                for record in batch.to_pylist():
                    row = _plain(record, f"{name}{MEMBER}", count - start, labels)
                    count += 1
                    yield Located(line=count, value=row)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read after row {count - start}: {error}; write it again") from error


def _opened(path: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if path.suffix.lower() == ".parquet":
        # Without it pyarrow keeps every row group that it has read.
        file = pq.ParquetFile(path, pre_buffer=False)
        for number in range(file.num_row_groups):
            check_row_group(file, number, path)
        return file.schema_arrow, file.iter_batches(batch_size=BATCH)
    reader = pa.ipc.open_stream(pa.memory_map(str(path)))
    pieces = (batch.slice(start, BATCH) for batch in reader for start in range(0, len(batch), BATCH))
    return reader.schema, pieces


def _features(schema: pa.Schema) -> datasets.Features:
    # Without what `datasets` writes there, nothing says more than the types, some of which it does not know.
    described = b"huggingface" in (schema.metadata or {})
    return datasets.Features.from_arrow_schema(schema) if described else datasets.Features()


def _labels(features: datasets.Features) -> dict[str, datasets.ClassLabel]:
    return {name: feature for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def _plain(record: dict[str, Any], prefix: str, number: int, labels: dict[str, datasets.ClassLabel]) -> dict[str, Any]:
    """A record with names for bytes and labels, without the keys that are null."""
    row = {}
    for key, value in record.items():
        if value is None:
            continue
        if key in labels and isinstance(value, int):
            row[key] = labels[key].int2str(value)
        else:
            row[key] = _named(value, f"{prefix}{key}[{number}]")
    return row


def _named(value: Any, name: str) -> Any:
    if isinstance(value, list) and any(isinstance(item, bytes | dict) for item in value):
        return [_named(item, f"{name}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, bytes):
        return name
    if isinstance(value, dict) and set(value) <= {"bytes", "path"} and value:
        return name if value.get("bytes") is not None else value.get("path")
    if isinstance(value, dict):
        # Arrow gives every object of a list all keys that any of them has.
        return {key: _whole(item) for key, item in value.items() if item is not None}
    return value


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {key: _whole(item) for key, item in value.items() if item is not None} if isinstance(value, dict) else value
