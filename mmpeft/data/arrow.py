"""The rows of a data source as a memory-mapped `datasets.Dataset`: text and names of media, never decoded pixels.

Each source is read once. Its rows lie in the Hugging Face datasets cache under the SHA-256 of what they are made
of, so a changed file is another entry and every process of a run maps the same one. A second hash is of what else
changes the rows: the layout, the column map, the question, and the container's name where rows hold it:

    $HF_DATASETS_CACHE/mmpeft/<sha-256>-<16 digits>-v3.arrow
    index  line  id    kind   images      turns                                  problem  ignored
    0      1     "s0"  ""     ["0.png"]   [{"role": "user", "text": …}, …]       ""       []
    1      9     "s1"  ""     []          []                                     "no …"   ["source"]
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from mmpeft.core.errors import DataError, OutputError
from mmpeft.data.formats import Row, fingerprint, read_rows
from mmpeft.data.problems import Problem
from mmpeft.data.types import Box, Sample, Turn

READER_VERSION = 3
"""Goes up with every change of what a row becomes, so that entries of an older reader are not used."""

FEATURES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "line": datasets.Value("int64"),
        "id": datasets.Value("string"),
        "kind": datasets.Value("string"),
        "images": datasets.List(datasets.Value("string")),
        "videos": datasets.List(datasets.Value("string")),
        "audios": datasets.List(datasets.Value("string")),
        "boxes": datasets.List(
            {
                "values": datasets.List(datasets.Value("float64")),
                "picture": datasets.Value("int64"),
                "unit": datasets.Value("string"),
            }
        ),
        "turns": datasets.List({"role": datasets.Value("string"), "text": datasets.Value("string")}),
        "problem": datasets.Value("string"),
        "ignored": datasets.List(datasets.Value("string")),
    }
)


def cached_rows(
    path: Path | str, *, columns: Mapping[str, str] | None = None, question: str | None = None
) -> tuple[datasets.Dataset, str]:
    """All rows of a data source, memory-mapped, and the SHA-256 of the source; arguments as `read_rows`.

    The SHA-256 is of a file's bytes; of folders and archives it is over names, sizes and times.

    Raises:
        DataError: the source cannot be read as a whole, or holds no row.
        OutputError: the cache cannot be written.
    """
    digest, manner = fingerprint(path, columns=columns, question=question)
    entry = Path(datasets.config.HF_DATASETS_CACHE) / "mmpeft" / f"{digest}-{manner[:16]}-v{READER_VERSION}.arrow"
    if not entry.is_file():
        _write(path, entry, read_rows(path, columns=columns, question=question))
    return datasets.Dataset.from_file(str(entry)), digest


def _write(path: Path | str, entry: Path, rows: Iterable[Row]) -> None:
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
    count = 0
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with ArrowWriter(features=FEATURES, path=str(temporary)) as writer:
            for row in rows:
                writer.write(_record(row))
                count += 1
            if not count:
                raise DataError(f"{path}: holds no sample; expected rows with samples in them")
            writer.finalize()
        temporary.replace(entry)
    except OSError as error:
        raise OutputError(
            f"cannot write the data cache {entry.parent}: {error.strerror or error}; free space there, or set "
            "HF_DATASETS_CACHE to another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _record(row: Row) -> dict[str, Any]:
    sample, problem = row.sample, row.problem
    place = sample or problem
    assert place is not None
    return {
        "index": place.index,
        "line": place.line,
        "id": place.id,
        "kind": sample.kind if sample else "",
        "images": list(sample.images) if sample else [],
        "videos": list(sample.videos) if sample else [],
        "audios": list(sample.audios) if sample else [],
        "boxes": [asdict(box) for box in sample.boxes] if sample else [],
        "turns": [{"role": turn.role, "text": turn.text} for turn in sample.turns] if sample else [],
        "problem": _storable(problem.reason) if problem else "",
        "ignored": [_storable(key) for key in row.ignored],
    }


def _storable(text: str) -> str:
    """Text without halves of surrogate pairs, which Arrow cannot hold."""
    return text.encode("utf-8", "replace").decode()


def row_of(record: Mapping[str, Any]) -> Row:
    """The row that a record of `cached_rows` came from."""
    ignored = tuple(record["ignored"])
    if record["problem"]:
        problem = Problem(index=record["index"], line=record["line"], id=record["id"], reason=record["problem"])
        return Row(problem=problem, ignored=ignored)
    sample = Sample(
        id=record["id"],
        turns=tuple(Turn(role=turn["role"], text=turn["text"]) for turn in record["turns"]),
        images=tuple(record["images"]),
        videos=tuple(record["videos"]),
        audios=tuple(record["audios"]),
        boxes=tuple(
            Box(values=tuple(box["values"]), picture=box["picture"], unit=box["unit"]) for box in record["boxes"]
        ),
        kind=record["kind"],
        index=record["index"],
        line=record["line"],
    )
    return Row(sample=sample, ignored=ignored)
