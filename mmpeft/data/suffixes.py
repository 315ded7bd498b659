"""What a medium is, by the end of its file's name."""

from collections.abc import Mapping
from pathlib import PurePosixPath

from mmpeft.core.types import Modality

SUFFIXES: Mapping[Modality, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"),
    "video": (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".m4v"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".aac", ".aiff", ".opus"),
}
"""Ends of names (lower case) by modality."""


def modality_of(name: str) -> Modality | None:
    """The modality that a file's name tells of; None if it tells of none."""
    suffix = PurePosixPath(name.lower()).suffix
    return next((modality for modality, suffixes in SUFFIXES.items() if suffix in suffixes), None)
