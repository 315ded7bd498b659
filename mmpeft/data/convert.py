"""A data source written in another format; what that cannot hold is an error that names the row.

target         holds                                                            OUT
llava          everything                                                       .json or .jsonl
messages       everything                                                       .json or .jsonl
swift          everything but boxes in thousandths                              .json or .jsonl
llamafactory   everything but boxes; its dataset_info.json is written too       .json or .jsonl
csv            one question, one answer, any media by name                      .csv or .tsv
parquet        everything                                                       .parquet
webdataset     everything, with the media's bytes                               a new folder
folder         one question, one answer, one medium with its bytes              a new folder
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import DataError, OutputError
from mmpeft.core.files import read_json, whole_directory, write_json
from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.formats import read_rows, source_root
from mmpeft.data.layouts.dataset_info import NAME
from mmpeft.data.problems import Problem
from mmpeft.data.rows import UnusableError
from mmpeft.data.types import Sample
from mmpeft.data.writers.files import write_json_rows, write_parquet, write_table
from mmpeft.data.writers.folders import write_folder, write_shards
from mmpeft.data.writers.shapes import (
    Shape,
    llamafactory_entry,
    llamafactory_row,
    llava_row,
    messages_row,
    swift_row,
    triple_row,
)

Target = Literal["llava", "messages", "swift", "llamafactory", "csv", "parquet", "webdataset", "folder"]
TARGETS: tuple[Target, ...] = get_args(Target)
CELL = 131_072
"""Characters of a cell that other programs read: the limit of Python's csv, unless it is told otherwise."""

_ENDINGS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llava", "messages", "swift", "llamafactory"), (".json", ".jsonl")),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
_SHAPES: Mapping[str, Shape] = {
    "llava": llava_row,
    "messages": messages_row,
    "swift": swift_row,
    "llamafactory": llamafactory_row,
}


@dataclass(kw_only=True)
class Converted:
    """What `convert_data` wrote.

    Attributes:
        samples: how many.
        media_root: the folder that the media's names in what was written are relative to.
        ignored: how many rows held each key that is not known and was not written.
        modalities: the media that there are.
        files: what was written.
    """

    samples: int = 0
    media_root: str = ""
    ignored: dict[str, int] = field(default_factory=dict)
    modalities: list[Modality] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


def convert_data(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Target,
    *,
    media_root: str | os.PathLike[str] | None = None,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
) -> Converted:
    """Write the samples of a source as `to`.

    Files name media as the source does, so they need the source's media root; `webdataset` and `folder` take the
    media's bytes with them.

    Args:
        path: any source (see `mmpeft.data.formats.read_rows`).
        out: the file or new folder to write.
        to: one of `TARGETS`.
        media_root: folder of the source's media; default: the source's own.
        columns, question: as `read_rows`.

    Raises:
        DataError: the source cannot be read, a row of it is no sample, or one that the target cannot hold: names
            the row. Nothing is written then.
        OutputError: `out` is the source, of another ending, a folder with files in it, or cannot be written.
    """
    source, target = str(path), Path(out)
    _check_target(source, target, to)
    root = Path(media_root) if media_root is not None else source_root(source)
    reader = _Reader(source, columns, question)
    if to in ("webdataset", "folder"):
        write = write_shards if to == "webdataset" else write_folder
        with whole_directory(target) as folder:
            write(folder, reader.samples(), root, reader.naming)
    elif to == "parquet":
        write_parquet(target, reader.rows(llava_row))
    elif to == "csv":
        _write_csv(target, reader)
    else:
        write_json_rows(target, reader.rows(_SHAPES[to]))
    written = [str(target)]
    if to == "llamafactory":
        written.append(str(_add_entry(target, set(reader.modalities))))
    return Converted(
        samples=reader.count,
        media_root=str(target if to in ("webdataset", "folder") else root),
        ignored=dict(reader.ignored),
        modalities=[modality for modality in MODALITIES if modality in reader.modalities],
        files=written,
    )


class _Reader:
    """The samples of a source, with what a report says of them."""

    def __init__(self, path: str, columns: Mapping[str, str] | None, question: str | None) -> None:
        self.path, self.columns, self.question = path, columns, question
        self.count = 0
        self.ignored: Counter[str] = Counter()
        self.modalities: set[Modality] = set()

    def samples(self) -> Iterator[Sample]:
        self.count, self.ignored = 0, Counter()
        for row in read_rows(self.path, columns=self.columns, question=self.question):
            if row.sample is None:
                assert row.problem is not None
                raise DataError(f"{row.problem.located(Path(self.path))}; nothing was written")
            self.count += 1
            self.ignored.update(row.ignored)
            self.modalities |= {modality for modality, names in row.sample.media.items() if names}
            yield row.sample
        if not self.count:
            raise DataError(f"{self.path}: holds no sample, so that there is nothing to write")

    def rows(self, shape: Shape) -> Iterator[dict[str, Any]]:
        for sample in self.samples():
            with self.naming(sample):
                row = shape(sample)
            yield row

    @contextlib.contextmanager
    def naming(self, sample: Sample) -> Iterator[None]:
        """Name the sample in what goes wrong with it."""
        try:
            yield
        except (UnusableError, DataError) as error:
            problem = Problem(index=sample.index, line=sample.line, id=sample.id, reason=str(error))
            raise DataError(f"{problem.located(Path(self.path))}; nothing was written") from error


def _check_target(source: str, target: Path, to: str) -> None:
    if to not in TARGETS:
        raise DataError(f"found the target {to!r}{did_you_mean(to, TARGETS)}")
    endings = _ENDINGS.get(to)
    if endings and target.suffix.lower() not in endings:
        raise OutputError(f"{target}: expected a name that ends in {' or '.join(endings)} for {to}")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise OutputError(f"{target} is the source; write the copy to another name")
    if to == "llamafactory":
        _entries(target)
    if target.is_dir() and (endings or any(target.iterdir())):
        raise OutputError(f"{target} is a folder that holds files; write to another name")
    if endings and target.is_file():
        raise OutputError(f"{target} is there already; remove it, or write to another name")
    if not endings and target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; {to} needs the name of a new folder")


def _write_csv(target: Path, reader: _Reader) -> None:
    """A table with the columns that some row needs, found in a first reading."""
    most: Counter[str] = Counter()
    used: dict[str, None] = {}
    for row in reader.rows(_checked_triple):
        used.update(dict.fromkeys(row))
        for modality in MODALITIES:
            most[modality] = max(most[modality], len(row.get(f"{modality}s", ())))
    single = {f"{modality}s": modality for modality in MODALITIES if most[modality] == 1}
    order = ("id", *(f"{modality}s" for modality in MODALITIES), "question", "answer", "kind")
    columns = [single.get(name, name) for name in order if name in used]

    def shape(sample: Sample) -> dict[str, Any]:
        row = triple_row(sample)
        return {single.get(name, name): value[0] if name in single else value for name, value in row.items()}

    write_table(target, reader.rows(shape), columns)


def _checked_triple(sample: Sample) -> dict[str, Any]:
    row = triple_row(sample)
    limit = CELL
    for name, value in row.items():
        length = len(value) if isinstance(value, str) else sum(len(item) + 8 for item in value)
        if length > limit:
            raise UnusableError(f"its {name} has {length} characters; a cell of a table holds {limit}: use llava")
    return row


def _entries(target: Path) -> dict[str, Any]:
    """The entries of the `dataset_info.json` beside a target."""
    info = target.parent / NAME
    try:
        entries = read_json(info) if info.is_file() else {}
    except (OSError, ValueError) as error:
        raise OutputError(f"{info}: cannot be read: {error}; correct it, or write {target.name} elsewhere") from error
    if not isinstance(entries, dict):
        raise OutputError(f"{info}: is no map of data sets; move it away, or write {target.name} elsewhere")
    return entries


def _add_entry(target: Path, modalities: set[Modality]) -> Path:
    """Name the file in the `dataset_info.json` beside it, other entries untouched."""
    info, entries = target.parent / NAME, _entries(target)
    entry = llamafactory_entry(target.name, modalities)
    same = [
        name for name, other in entries.items() if isinstance(other, dict) and other.get("file_name") == target.name
    ]
    free = target.stem if target.stem not in entries else target.name
    write_json(info, {**entries, **dict.fromkeys(same or [free], entry)})
    return info
