"""A folder of pictures (films, recordings) with their captions, as Hugging Face's imagefolder has them.

    pictures/metadata.jsonl      {"file_name": "a.png", "text": "a red square"}; or metadata.csv, in any subfolder
    pictures/a.png, a.txt        without metadata, the text file of the same name
    pictures/cat/a.png           without both, the folder's name, if every picture lies in one

The first of the three that is there is used. Links that lead out of the folder are not followed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.data.reading import Located, read_objects
from mmpeft.data.sources.base import Container, listing_digest, some
from mmpeft.data.sources.tables import table
from mmpeft.data.suffixes import modality_of

METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "eval", "dev"})
"""Names of folders that hold the splits of a data set."""
MAX_CAPTION = 1 << 20
"""Bytes of the longest caption file that is read."""


def media_folder(folder: Path) -> Container | None:
    """The pictures of a folder with what is said of them; None if there is no medium in it.

    Raises:
        DataError: nothing is said of them.
    """
    media, metadata = _files(folder)
    if metadata:
        return Container(
            name="a folder with metadata",
            root=folder,
            rows=lambda: _from_metadata(folder, metadata),
            digest=lambda: listing_digest((), root=folder, read=metadata),
        )
    if not media:
        return None
    captions = [path.with_suffix(".txt") for path in media]
    written = [path for path in captions if path.is_file()]
    if written:
        return Container(
            name="a folder with captions",
            root=folder,
            rows=lambda: _from_texts(folder, media),
            digest=lambda: listing_digest(media, root=folder, read=[path for path in written if _inside(path, folder)]),
        )
    loose = [path for path in media if len(path.relative_to(folder).parts) != 2]
    if loose:
        raise DataError(
            f"{folder}: holds {len(media)} media without captions ({some(path.name for path in media)}); expected "
            f"{METADATA[0]}, or a text file beside each, or a folder for each class and no picture beside those"
        )
    classes = sorted({path.parent.name for path in media})
    return Container(
        name=f"a folder of {len(classes)} classes",
        root=folder,
        rows=lambda: _from_classes(folder, media),
        digest=lambda: listing_digest(media, root=folder),
        note=f"there are no captions, so the folders' names are the answers: {some(classes)}",
    )


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Media and metadata files below a folder, hidden ones aside, in the order of their names."""
    media, metadata = [], []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        if path.name in METADATA and not _inside(path, folder):
            raise DataError(f"{path}: is a link that leads out of {folder}; put the file itself there")
        if path.name in METADATA:
            metadata.append(path)
        elif modality_of(path.name):
            media.append(path)
    _refuse_splits(folder, media)
    return media, metadata


def _refuse_splits(folder: Path, media: Sequence[Path]) -> None:
    """One source is one split: a folder of several must not be trained on as a whole.

    Raises:
        DataError: it holds folders named after splits.
    """
    first = {path.relative_to(folder).parts[0] for path in media if len(path.relative_to(folder).parts) > 1}
    found = sorted(name for name in first if name.lower() in SPLITS)
    if len(found) > 1:
        raise DataError(f"{folder}: holds the splits {some(found)}; give one of them, as in {folder / found[0]}")


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _from_metadata(folder: Path, metadata: Sequence[Path]) -> Iterator[Located]:
    """The rows of metadata files, their `file_name` relative to the folder."""
    for path in metadata:
        inside = path.parent.relative_to(folder)
        for located in read_objects(path) if path.suffix == ".jsonl" else table(path).rows():
            row = located.value
            if isinstance(row, dict) and isinstance(row.get("file_name"), str) and inside.parts:
                row = {**row, "file_name": (inside / row["file_name"]).as_posix()}
            yield Located(line=located.line, value=row, fault=located.fault)


def _from_texts(folder: Path, media: Sequence[Path]) -> Iterator[Located]:
    for number, path in enumerate(media, start=1):
        name, caption = path.relative_to(folder).as_posix(), path.with_suffix(".txt")
        row: dict[str, Any] = {"id": path.relative_to(folder).with_suffix("").as_posix(), "file_name": name}
        try:
            if not _inside(caption, folder):
                fault = f"{caption.name} is a link that leads out of {folder}; put the file itself there"
                yield Located(line=number, fault=fault)
                continue
            size = caption.stat().st_size
            if size > MAX_CAPTION:
                yield Located(line=number, fault=f"{caption.name} has {size} bytes; at most {MAX_CAPTION} are read")
                continue
            row["caption"] = caption.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            yield Located(line=number, fault=f"{name!r} has no caption; write {caption.name} beside it, or remove it")
        except (OSError, UnicodeDecodeError) as error:
            yield Located(line=number, fault=f"{caption.name} cannot be read: {error}; save it as UTF-8")
        else:
            yield Located(line=number, value=row)


def _from_classes(folder: Path, media: Sequence[Path]) -> Iterator[Located]:
    for number, path in enumerate(media, start=1):
        name = path.relative_to(folder)
        row = {"id": name.with_suffix("").as_posix(), "file_name": name.as_posix(), "label": path.parent.name}
        yield Located(line=number, value=row)
