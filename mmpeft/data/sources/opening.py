"""What kind of container a path names, by its ending and, for folders, by what lies in it."""

import os
import re
from pathlib import Path

from mmpeft.core.errors import DataError
from mmpeft.core.lazy import LazyModule
from mmpeft.data.reading import check_file, read_objects
from mmpeft.data.sources import shards, tables
from mmpeft.data.sources.base import Container, content_digest, some
from mmpeft.data.sources.folder import media_folder

# Lazy, for `datasets` brings torch, which a check of JSON, tables, folders and tars can do without.
columnar = LazyModule("mmpeft.data.sources.columnar")
saved = LazyModule("mmpeft.data.sources.saved")

EXPECTED = (
    "a folder of pictures with metadata.jsonl or text files beside them, of .tar shards, of .parquet files, or one "
    "that datasets' save_to_disk wrote"
)
SAVED = ("state.json", "dataset_dict.json")
"""One of these lies in a folder that `save_to_disk` wrote."""

_DATA_FILES = (".json", ".jsonl", ".csv", ".tsv")


def is_hub_name(text: str) -> bool:
    """Whether a source is a hub data set; also where `pathlib` has taken one of the slashes away."""
    return text.startswith("hf:/")


def is_source(path: Path | str) -> bool:
    """Whether something lies at `path` that could be a data source; a hub name is taken at its word."""
    found = Path(path)
    return is_hub_name(str(path)) or os.path.exists(found) or (shards.is_pattern(found) and found.parent.is_dir())


def open_container(path: Path | str) -> Container:
    """The container at `path`: a file, a folder, a brace pattern of shards, or `hf://owner/name`.

    Raises:
        DataError: there is none, or none that can be read.
    """
    if is_hub_name(str(path)):
        return saved.hub_dataset(str(path))
    path = Path(path)
    if shards.is_pattern(path):
        return shards.shards(shards.expand(path), path.parent)
    # Not pathlib's, which raises where a name is too long.
    if os.path.isdir(path):
        return _folder(path)
    check_file(path)
    suffix = path.suffix.lower()
    if suffix in tables.SUFFIXES:
        return tables.table(path)
    if suffix == ".parquet":
        return columnar.parquet_file(path)
    if suffix == ".tar":
        return shards.shards([path], path.parent)
    if path.name.lower().endswith(shards.COMPRESSED):
        raise DataError(f"{path}: is compressed, so that its members cannot be found; unpack it to .tar")
    return Container(
        name="JSON Lines" if suffix == ".jsonl" else "JSON",
        root=path.parent,
        rows=lambda: read_objects(path),
        digest=lambda: content_digest(path),
    )


def _folder(folder: Path) -> Container:
    if any((folder / name).is_file() for name in SAVED):
        return saved.saved_dataset(folder)
    if archives := _alike(folder, ".tar"):
        return shards.shards(archives, folder)
    # As clones of hub data sets have it.
    for place in (folder, folder / "data"):
        if files := _alike(place, ".parquet"):
            return columnar.parquet_files(files, place)
    return _without_shards(folder)


def _alike(folder: Path, suffix: str) -> list[Path]:
    """The files of that suffix in a folder, which must differ in numbers alone: `train-0` and `test-0` do not mix."""
    if not folder.is_dir():
        return []
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() == suffix and path.is_file())
    names = {re.sub(r"\d+", "#", path.name): path.name for path in paths}
    if len(names) > 1:
        raise DataError(
            f"{folder}: holds files of several names ({some(names)}), which may be different splits; name one, such as "
            f"{folder / paths[0].name}, or put each split into a folder of its own"
        )
    return paths


def _without_shards(folder: Path) -> Container:
    files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _DATA_FILES)
    named = [name for name in files if not name.startswith("metadata.")]
    if named:
        raise DataError(f"{folder}: is a directory that holds {some(named)}; name the file: {folder / named[0]}")
    found = media_folder(folder)
    if found is None:
        raise DataError(f"{folder}: is a directory without data that is known; expected a file in it, or {EXPECTED}")
    return found
