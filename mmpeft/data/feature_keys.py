"""Under which key the features of a sample's media are kept: a hash of all that they depend on.

    the bytes of each medium, and their order
    how much of them is decoded (`MediaLimits`), and by which libraries
    the processor's settings: sizes, crops, tiles, tokens in a medium's place
    the weights of the towers (`FeaturePlan.identity`)

A key belongs to all media of a sample together, for processors cut several pictures into other tiles than one.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import transformers

from mmpeft.core.hashing import hash_value
from mmpeft.core.types import Modality
from mmpeft.data.chat import PLACEHOLDER
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.roots import MediaFile, resolve_inside
from mmpeft.data.types import WORDS, Sample

FORMAT = 1
"""Raised when entries that were written before can no longer be used."""

_SOUND = ("sampling_rate", "max_seconds", "too_long")
_LIMITS: Mapping[Modality, Sequence[str]] = {
    "image": ("max_image_pixels",),
    "video": ("fps", "max_frames", "frame_pixels", "use_audio_in_video", *_SOUND),
    "audio": _SOUND,
}
"""The fields of `MediaLimits` by what they bound: frames of a film change nothing about a picture."""

_DECODERS = ("pillow", "av", "soundfile", "soxr", "numpy")
_WORKERS = ("image_processor", "video_processor", "feature_extractor")
_SIMPLE = (str, int, float, bool, list, tuple, type(None))
_CHUNK = 1 << 20

Named = tuple[Modality, str]
"""A medium of a sample: its kind, and its name in the data file."""


@dataclass(frozen=True, kw_only=True)
class FeatureKeys:
    """Makes keys for the samples of one data file.

    Attributes:
        root: the folder that media names are relative to.
        settings: hash of everything but the media themselves and how much of each is decoded.
        limits: of each kind of medium, what of its limits decides how it is decoded, as text.
    """

    root: Path
    settings: str
    limits: Mapping[Modality, str]

    def of(self, media: Sequence[Named], *, texts: bool = False) -> str:
        """The key of these media, in this order.

        Args:
            texts: the key of the texts that take their place alone, without features.

        Raises:
            DataError: a medium is missing or lies outside the root.
        """
        digest = hashlib.blake2b(self.settings.encode() + (b"texts" if texts else b""), digest_size=20)
        for modality, name in media:
            digest.update(
                f"{modality}:{self.limits[modality]}:".encode() + _digest_of(name, self.root, WORDS[modality])
            )
        return digest.hexdigest()


def feature_keys(processor: Any, *, root: Path, limits: MediaLimits, identity: str) -> FeatureKeys:
    """Keys for samples that this processor encodes.

    Args:
        identity: of the weights that make the features.
    """
    said = [FORMAT, identity, processor_settings(processor), _libraries()]
    told = {
        modality: ",".join(f"{name}={getattr(limits, name)}" for name in names) for modality, names in _LIMITS.items()
    }
    return FeatureKeys(root=root, settings=hash_value(said), limits=told)


def processor_settings(processor: Any) -> dict[str, Any]:
    """What of a processor decides what it makes of media: all but the tokenizer and the chat template."""
    own = {name: value for name, value in sorted(vars(processor).items()) if isinstance(value, _SIMPLE)}
    own.pop("chat_template", None)
    workers = {name: getattr(processor, name, None) for name in _WORKERS}
    return {
        "class": type(processor).__name__,
        "own": own,
        **{
            name: [type(worker).__name__, json.loads(json.dumps(worker.to_dict(), default=str))]
            for name, worker in workers.items()
            if worker is not None
        },
    }


def media_in_order(sample: Sample) -> list[Named]:
    """A sample's media as their placeholders stand in its text."""
    names = {modality: iter(found) for modality, found in sample.media.items()}
    marks = (found for turn in sample.turns for found in PLACEHOLDER.finditer(turn.text))
    kinds = (cast(Modality, found.lastgroup) for found in marks)
    return [(kind, str(next(names[kind]))) for kind in kinds]


@functools.cache
def _libraries() -> dict[str, str]:
    versions = {"transformers": transformers.__version__}
    for name in _DECODERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _digest_of(name: str, root: Path, kind: str) -> bytes:
    file = resolve_inside(name, root=root, kind=kind)
    if isinstance(file, Path):
        facts = file.stat()
        return _digest_of_file(file, facts.st_size, facts.st_mtime_ns)
    return _digest(file)


@functools.lru_cache(maxsize=1 << 16)
def _digest_of_file(path: Path, size: int, modified: int) -> bytes:
    """Of a file's bytes, read again only if its size or date have changed."""
    return _digest(path)


def _digest(file: MediaFile) -> bytes:
    digest = hashlib.blake2b(digest_size=20)
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.digest()
