"""WebDataset shards: tar archives whose members of one stem, one after another, are a sample.

    shards/data-000000.tar    0001.jpg 0001.json 0002.jpg 0002.txt …
    its rows                  {"id": "0001", "images": ["data-000000.tar::0001.jpg"], …what the JSON holds…}
                              {"id": "0002", "images": ["data-000000.tar::0002.jpg"], "caption": "a cat"}

A sample's JSON is a row of any layout; `.txt` is a caption, `.cls` a class. Nothing is unpacked, links are refused.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.core.types import MODALITIES
from mmpeft.data.embedded import MEMBER
from mmpeft.data.reading import Located
from mmpeft.data.rows import MEDIA_KEYS
from mmpeft.data.sources.base import Container, listing_digest, some
from mmpeft.data.suffixes import modality_of

MAX_TEXT = 16 << 20
"""Bytes of the largest JSON or text member that is read."""

MAX_SHARDS = 100_000
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_Members = dict[str, tarfile.TarInfo]


def is_pattern(path: Path) -> bool:
    """Whether a path is a brace pattern of shards: `data-{000000..000012}.tar`."""
    return path.name.lower().endswith(".tar") and _BRACES.search(path.name) is not None


def shards(paths: Sequence[Path], root: Path) -> Container:
    """The samples of tar archives in `root`, in order."""
    return Container(
        name=f"WebDataset ({len(paths)} shard{'' if len(paths) == 1 else 's'})",
        root=root,
        rows=lambda: _rows(paths, root),
        digest=lambda: listing_digest(paths, root=root),
        anchor=f"{len(paths)} {paths[0].name}",
    )


def expand(pattern: Path) -> list[Path]:
    """The shards that a brace pattern names.

    Raises:
        DataError: it names too many, or one is not there.
    """
    found = _BRACES.search(pattern.name)
    assert found is not None
    first, last, width = int(found[1]), int(found[2]), len(found[1])
    if not 0 <= last - first < MAX_SHARDS:
        raise DataError(f"{pattern}: {found[0]} counts {last - first + 1} shards; expected 1 to {MAX_SHARDS}")
    numbers = (f"{number:0{width}d}" for number in range(first, last + 1))
    names = [pattern.name[: found.start()] + number + pattern.name[found.end() :] for number in numbers]
    paths = [pattern.with_name(name) for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{pattern}: {len(missing)} of {len(paths)} shards are not there: {some(missing)}")
    return paths


def _rows(paths: Sequence[Path], root: Path) -> Iterator[Located]:
    count = 0
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            with tarfile.open(path, "r:") as tar:
                for stem, members in _groups(tar):
                    count += 1
                    yield _located(tar, name, stem, members, count)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{path}: is no whole tar archive after sample {count}: {error}; write it again") from error


def _groups(tar: tarfile.TarFile) -> Iterator[tuple[str, _Members]]:
    """Members of one stem that follow each other, by what comes after the stem's dot."""
    stem, members = "", _Members()
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
        if member.isdir():
            continue
        folder, _, file = member.name.rpartition("/")
        base, _, ending = file.partition(".")
        own, ending = f"{folder}/{base}" if folder else base, ending.lower()
        if own != stem or ending in members:
            if members:
                yield stem, members
            stem, members = own, _Members()
        members[ending] = member
    if members:
        yield stem, members
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """A whole archive ends in blocks of zeros; without them it was cut, be it between two samples.

    Raises:
        EOFError: they are not there.
    """
    file: Any = tar.fileobj
    file.seek(tar.offset)  # behind the last header that was read
    rest = file.read(tarfile.BLOCKSIZE)
    file.seek(max(0, tar.offset - tarfile.BLOCKSIZE))
    before = file.read(tarfile.BLOCKSIZE)
    if tarfile.NUL * tarfile.BLOCKSIZE not in (rest, before):
        raise EOFError("the blocks that end it are missing, so it was cut off")


def _located(tar: tarfile.TarFile, shard: str, stem: str, members: _Members, line: int) -> Located:
    linked = [member.name for member in members.values() if not member.isreg()]
    if linked:
        return Located(line=line, fault=f"{shard} holds the link or device {linked[0]!r}, which is not followed")
    try:
        row = _object(tar, members)
    except (ValueError, RecursionError) as error:
        return Located(line=line, fault=f"{shard}{MEMBER}{stem} cannot be read: {error}")
    row.setdefault("id", stem)
    texts = {"txt": "caption", "cls": "label"}
    for ending, key in texts.items():
        if ending in members and row.get(key) is None:
            try:
                row[key] = _read(tar, members[ending]).decode("utf-8-sig").strip()
            except ValueError as error:
                return Located(line=line, fault=f"{shard}{MEMBER}{members[ending].name} cannot be read: {error}")
    for modality in MODALITIES:
        found = sorted(member.name for member in members.values() if modality_of(member.name) == modality)
        if found:
            names = _ordered(row, MEDIA_KEYS[modality], found)
            for key in MEDIA_KEYS[modality]:
                row.pop(key, None)
            row[f"{modality}s"] = [f"{shard}{MEMBER}{name}" for name in names]
    return Located(line=line, value=row)


def _object(tar: tarfile.TarFile, members: _Members) -> dict[str, Any]:
    if "json" not in members:
        return {}
    value = json.loads(_read(tar, members["json"]))
    if not isinstance(value, dict):
        raise ValueError("its JSON is no object; expected one with the sample's texts")
    return value


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_TEXT:
        raise ValueError(f"{member.name} has {member.size} bytes; at most {MAX_TEXT} are read")
    file = tar.extractfile(member)
    return file.read() if file else b""


def _ordered(row: dict[str, Any], keys: Sequence[str], found: list[str]) -> list[str]:
    """The members in the order in which the JSON names them, if it names each; else in the order of their names."""
    value: Any = next((row[key] for key in keys if row.get(key) is not None), [])
    listed = value if isinstance(value, list) else [value]
    by_name = {PurePosixPath(name).name: name for name in found}
    named = [by_name.get(PurePosixPath(item).name, "") for item in listed if isinstance(item, str)]
    return named if set(named) == set(found) else found
