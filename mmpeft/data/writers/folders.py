"""Samples written to a folder with their media: WebDataset shards, or files beside a metadata.jsonl.

shards-000000.tar    00000000.image0.png 00000000.json 00000001.audio0.wav 00000001.json …
metadata.jsonl       {"file_name": "00000000.png", "id": "a", "question": "<image>…", "answer": "…"}
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmpeft.core.types import Modality
from mmpeft.data.roots import MediaFile, resolve_inside
from mmpeft.data.rows import MEDIA_KEYS, UnusableError
from mmpeft.data.suffixes import SUFFIXES, modality_of
from mmpeft.data.types import WORDS, Sample
from mmpeft.data.writers.shapes import llava_row, triple_row

SHARD_BYTES = 1 << 30
"""A shard is closed when it has so many bytes."""

SHARD_SAMPLES = 10_000
METADATA = "metadata.jsonl"

_KINDS = {"image": "picture", "video": "video", "audio": "audio file"}
_BEGINNINGS = (
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"GIF8", ".gif"),
    (8, b"WEBP", ".webp"),
    (0, b"BM", ".bmp"),
    (0, b"II*\0", ".tif"),
    (0, b"MM\0*", ".tif"),
    (8, b"WAVE", ".wav"),
    (0, b"fLaC", ".flac"),
    (0, b"OggS", ".ogg"),
    (0, b"ID3", ".mp3"),
    (4, b"ftypM4A", ".m4a"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".mkv"),
    (8, b"AVI ", ".avi"),
)
"""How files of each kind begin, for media whose names do not tell it."""


def _medium(name: str, modality: Modality, root: Path) -> tuple[MediaFile, str]:
    """A medium and the ending under which it is written."""
    medium = resolve_inside(name, root=root, kind=_KINDS[modality])
    if not name.startswith("data:") and modality_of(name) == modality:
        return medium, Path(name).suffix.lower()
    with medium.open("rb") as file:
        head = file.read(16)
    found = (ending for place, mark, ending in _BEGINNINGS if head[place:].startswith(mark))
    ending = next((ending for ending in found if ending in SUFFIXES[modality]), "")
    if not ending:
        raise UnusableError(f"{WORDS[modality]} {name[:60]!r} is of a kind that is not known by its name or beginning")
    return medium, ending


def write_shards(folder: Path, samples: Iterable[Sample], root: Path, check: Any) -> None:
    """Shards of LLaVA rows with their media, in a folder that is empty.

    Args:
        folder: where the shards are written.
        samples: what is written.
        root: the folder that the samples' media lie in.
        check: a context manager around what is done for a sample, which names it in errors.
    """
    tar: tarfile.TarFile | None = None
    shard = written = 0
    try:
        for number, sample in enumerate(samples):
            if tar is None:
                tar, written = tarfile.open(folder / f"shards-{shard:06d}.tar", "w"), 0  # noqa: SIM115
            with check(sample):
                _write_group(tar, f"{number:08d}", sample, root)
            written += 1
            if tar.offset >= SHARD_BYTES or written >= SHARD_SAMPLES:
                tar.close()
                tar, shard = None, shard + 1
    finally:
        if tar is not None:
            tar.close()


def _write_group(tar: tarfile.TarFile, key: str, sample: Sample, root: Path) -> None:
    row = llava_row(sample)
    for modality, names in sample.media.items():
        members = []
        for place, name in enumerate(names):
            medium, ending = _medium(name, modality, root)
            members.append(f"{key}.{modality}{place}{ending}")
            with medium.open("rb") as file:
                _add(tar, members[-1], file, medium.stat().st_size)
        for field in MEDIA_KEYS[modality]:
            row.pop(field, None)
        if members:
            row[f"{modality}s"] = members
    text = json.dumps(row, ensure_ascii=False).encode()
    _add(tar, f"{key}.json", io.BytesIO(text), len(text))


def _add(tar: tarfile.TarFile, name: str, file: Any, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.addfile(member, file)
    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory


def write_folder(folder: Path, samples: Iterable[Sample], root: Path, check: Any) -> None:
    """One file a sample and a metadata.jsonl, in a folder that is empty; arguments as `write_shards`."""
    with (folder / METADATA).open("w", encoding="utf-8") as metadata:
        for number, sample in enumerate(samples):
            with check(sample):
                row = _folder_row(folder, f"{number:08d}", sample, root)
            metadata.write(json.dumps(row, ensure_ascii=False) + "\n")


def _folder_row(folder: Path, key: str, sample: Sample, root: Path) -> dict[str, Any]:
    media = [(modality, name) for modality, names in sample.media.items() for name in names]
    if len(media) != 1:
        raise UnusableError(f"it has {len(media)} media; a folder's row holds one: use webdataset or llava")
    row = triple_row(sample)
    (modality, name) = media[0]
    del row[f"{modality}s"]
    medium, ending = _medium(name, modality, root)
    with medium.open("rb") as source, (folder / f"{key}{ending}").open("wb") as target:
        shutil.copyfileobj(source, target)
    return {"file_name": f"{key}{ending}", **row}
