"""How long the samples of a data file are in tokens, for batches that are cut by it; no picture is decoded.

Measured once a file and processor, and kept beside the file's rows (see `arrow`) as one memory-mapped array:

    $HF_DATASETS_CACHE/mmpeft/lengths-<32 digits>-v1.npy        28 bytes a sample
    tokens  media  shared  picture  beginning
    612     576    583     0x3f…    0x91…
    618     576    583     0x3f…    0x91…       the same picture, and the same 583 tokens to begin with
    40      0      0       0        0           text alone

Pictures are known by the header of their file, films and recordings by theirs: where a header is wrong about a
duration, or an augmentation changes a text or a picture's size, a length is an estimate.
"""

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers

from mmpeft.core.errors import DataError
from mmpeft.core.hashing import hash_value
from mmpeft.core.types import IGNORE_INDEX, Modality
from mmpeft.data.arrow import row_of
from mmpeft.data.audio import check_audio
from mmpeft.data.box_text import spelt_out
from mmpeft.data.chat import control_tokens
from mmpeft.data.checks.prints import print_of
from mmpeft.data.encode import cut_before_media
from mmpeft.data.expand import audio_length, fixed_picture_length
from mmpeft.data.labels import LabelledTokens, label_turns
from mmpeft.data.lengths import Measured, media_lengths, stretched
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.pictures import Film, Found, Medium, Recording, media_names, read_medium, with_media
from mmpeft.data.problems import Problem
from mmpeft.data.roots import resolve_inside
from mmpeft.data.types import Sample
from mmpeft.data.video import check_video

logger = logging.getLogger(__name__)

VERSION = 1
"""Goes up with every change of what is measured, so that entries of an older reader are not used."""

LENGTHS = np.dtype(
    [("tokens", "<i4"), ("media", "<i4"), ("shared", "<i4"), ("picture", "<u8"), ("beginning", "<u8")], align=False
)
"""A sample's row: its tokens, media included; those that stand for media; those up to behind its last medium, where
another sample can share them (else 0); a print of its media's names (0 without any); a print of the shared tokens."""

Lengths = np.ndarray
"""An array [samples] of `LENGTHS`."""

_MANY = 20_000
"""Samples from which measuring is worth a line in the log."""

_ANY_SIZE = (64, 64)
_STAMPS = 65_536


def cached_lengths(
    rows: datasets.Dataset,
    *,
    fingerprint: str,
    processor: Any,
    root: Path,
    path: Path,
    limits: MediaLimits,
    max_length: int | None,
) -> Lengths:
    """The lengths of all rows, from the cache if they were measured before.

    Args:
        rows: of `mmpeft.data.arrow.cached_rows`, without those that cannot be used.
        fingerprint: of what the rows were made of.
        path: the data file, for messages.

    Raises:
        DataError: a sample that cannot be measured: names file, line, sample and reason.
    """
    identity = [fingerprint, processor_identity(processor), str(root.resolve()), str(limits), max_length]
    identity += [_rows_print(rows), _media_print(rows, processor, root)]
    entry = Path(datasets.config.HF_DATASETS_CACHE) / "mmpeft" / f"lengths-{hash_value(identity)[:32]}-v{VERSION}.npy"
    if (found := _read(entry, len(rows))) is not None:
        return found
    if len(rows) >= _MANY:
        logger.info("%s: the tokens of %d samples are counted, once", path, len(rows))
    measured = np.fromiter(
        _measure(rows, processor=processor, root=root, path=path, limits=limits, max_length=max_length),
        dtype=LENGTHS,
        count=len(rows),
    )
    _write(entry, measured)
    return measured


def processor_identity(processor: Any) -> str:
    """SHA-256 (hex) of all that decides which tokens a processor makes of a text and of a medium of some size."""
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    settings = processor.to_dict() if hasattr(processor, "to_dict") else repr(processor)
    template = getattr(processor, "chat_template", None)
    return hash_value([type(processor).__name__, settings, template, tokenizer, transformers.__version__])


def _rows_print(rows: datasets.Dataset) -> str:
    """Of which rows there are: those that could not be used were left out."""
    numbers = rows.with_format("numpy", columns=["index"])[:]["index"]
    return hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes()).hexdigest()


def _media_print(rows: datasets.Dataset, processor: Any, root: Path) -> str:
    """Of the sizes and times of the files of media, where a length depends on what is in them."""
    digest = hashlib.sha256()
    stamp = functools.lru_cache(maxsize=_STAMPS)(partial(_stamp, root))
    names: list[tuple[Modality, str]] = [("video", "videos"), ("audio", "audios")]
    if not _any_size(processor):
        names.append(("image", "images"))
    for _, column in names:
        for start in range(0, len(rows), 1024):
            for row in rows[start : start + 1024][column]:
                for name in row:
                    digest.update(stamp(name))
    return digest.hexdigest()


def _any_size(processor: Any) -> bool:
    """Whether pictures take as many tokens whatever their size."""
    return "image" not in control_tokens(processor).media or fixed_picture_length(processor) is not None


def _stamp(root: Path, name: str) -> bytes:
    # What lies in a data: URL is part of the data file's own content, as is what a member of it holds.
    if name.startswith("data:"):
        return b"-"
    found = resolve_inside(name.partition("::")[0], root=root, kind="medium")
    state: Any = found.stat()
    return f"{state.st_size}:{getattr(state, 'st_mtime_ns', 0)};".encode()


def _read(entry: Path, count: int) -> Lengths | None:
    """An entry of the cache; None if there is none, or it is of another shape or cut short."""
    try:
        found = np.load(entry, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.dtype == LENGTHS and found.shape == (count,) and int(found["tokens"].min()) > 0 else None


def _write(entry: Path, lengths: Lengths) -> None:
    """Keep lengths for the next run; where that fails they are counted again then."""
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, lengths)
        temporary.replace(entry)
    except OSError as error:
        logger.warning("the lengths of samples are not kept for the next run: %s: %s", entry.parent, error.strerror)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _measure(
    rows: datasets.Dataset, *, processor: Any, root: Path, path: Path, limits: MediaLimits, max_length: int | None
) -> Iterator[tuple[int, ...]]:
    """A row of `LENGTHS` for each sample."""
    read = partial(_of_header, root, limits, _any_size(processor))
    for window, media in with_media(map(row_of, rows), read):
        for sample in (row.sample for row in window if row.sample is not None):
            try:
                found = [media[medium] for medium in media_names(sample)]
                if faults := [fault for fault in found if isinstance(fault, str)]:
                    raise DataError(faults[0])
                readable = [medium for medium in found if not isinstance(medium, str)]
                written = spelt_out(processor, sample, root=root, limits=limits)
                yield _length(processor, written, readable, _tracks(processor, readable, limits), max_length, root)
            except DataError as error:
                problem = Problem(index=sample.index, line=sample.line, id=sample.id, reason=str(error))
                raise DataError(problem.located(path)) from error


def _of_header(root: Path, limits: MediaLimits, any_size: bool, medium: Medium) -> Found:
    """What a medium is by its header: a film of the frames that training uses of it, a recording of its seconds."""
    modality, name = medium
    if modality == "image":
        return _ANY_SIZE if any_size else read_medium("header", root, limits, medium)
    try:
        if modality == "audio":
            seconds = min(check_audio(name, root=root).duration, limits.max_seconds)
            return Recording(max(1, round(seconds * limits.sampling_rate)), limits.sampling_rate)
        facts = check_video(name, root=root)
        seconds = facts.duration or facts.frames / (facts.fps or 1)
        count = facts.frames if limits.fps is None else int(seconds * limits.fps + 1e-6)
        count = max(1, min(count, limits.max_frames, facts.frames or count))
        scale = min(1.0, ((limits.frame_pixels or facts.width * facts.height) / (facts.width * facts.height)) ** 0.5)
        height, width = max(1, int(facts.height * scale)), max(1, int(facts.width * scale))
        return Film(count, height, width, count / seconds if seconds else 1.0)
    except DataError as error:
        return str(error)


def _tracks(processor: Any, media: Sequence[Measured], limits: MediaLimits) -> int:
    """Tokens that the sound of films takes."""
    if not limits.use_audio_in_video:
        return 0
    seconds = (min(film.frames / film.fps, limits.max_seconds) for film in media if isinstance(film, Film))
    rate = limits.sampling_rate
    return sum(audio_length(processor, max(1, round(one)) * rate, rate) for one in seconds)


def _length(
    processor: Any, sample: Sample, media: Sequence[Measured], tracks: int, max_length: int | None, root: Path
) -> tuple[int, ...]:
    tokens = label_turns(processor, sample.turns)
    lengths = media_lengths(processor, media) or []
    whole = stretched(processor, tokens, lengths) if lengths else tokens
    count = cut_before_media(whole, max_length, control_tokens(processor).ids)
    kept = [(start, end) for start, end in whole.media if end <= count]
    picture = print_of(str(root), *(name for _, name in media_names(sample))) if media else 0
    shared, beginning = _beginning(whole, kept)
    tokens_of_media = sum(end - start for start, end in kept) + tracks
    return count + tracks, tokens_of_media, shared + (tracks if shared else 0), picture, beginning


def _beginning(tokens: LabelledTokens, media: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """How many tokens a sample could share with another on the same media, and a print of them; 0 and 0 for none.

    A row of several samples shares what they begin with up to the token that predicts the first label (see
    `packing`), and only if all media stand in it.
    """
    first = next(place for place, label in enumerate(tokens.labels) if label != IGNORE_INDEX)
    if not media or len(media) < len(tokens.media) or media[-1][1] > first - 1:
        return 0, 0
    end = media[-1][1]
    return end, print_of(",".join(map(str, tokens.input_ids[:end])))
