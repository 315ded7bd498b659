"""The media of many rows, each file read once, in threads (PIL and ffmpeg decode without the interpreter's lock)."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from mmpeft.core.errors import DataError
from mmpeft.core.types import Modality
from mmpeft.data.audio import check_audio, load_audio
from mmpeft.data.checks.prints import print_of
from mmpeft.data.embedded import shown
from mmpeft.data.formats import Row
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.media import MAX_IMAGE_PIXELS, check_image, load_image
from mmpeft.data.types import Sample
from mmpeft.data.video import MAX_DECODED_BYTES, check_video, load_video

Verify = Literal["header", "decode"]
"""How far media are read up front: to their size, or to their last pixel or sound."""

Picture = tuple[int, int] | str
"""(width, height) of a readable picture, or why it is not readable."""

Medium = tuple[Modality, str]
"""A medium's modality and its name in the data file."""


class Film(NamedTuple):
    """What is known of a readable film; of one whose header alone was read, no `frames`.

    Attributes:
        frames: frames that are used.
        height, width: pixels of a used frame.
        fps: used frames a second of the film.
    """

    frames: int
    height: int
    width: int
    fps: float


class Recording(NamedTuple):
    """What is known of a readable recording: samples at `sampling_rate` (0 where only its header was read)."""

    samples: int
    sampling_rate: int


Found = tuple[int, int] | Film | Recording | str
"""What a medium is, a picture as (width, height); or why it is not readable."""

_ROWS_AT_ONCE = 1024
_THREADS = min(8, (os.cpu_count() or 1) + 4)

_MOST_HELD = 16 << 20
"""Characters of names of media that a window of rows holds: `data:` URLs are the media themselves."""

_SMALL_FRAME = 4096
"""Pixels of frames that are decoded only to see that they can be: many films are open side by side."""


def media_names(sample: Sample) -> Iterator[Medium]:
    """A sample's media, each as often as it stands there."""
    for modality, names in sample.media.items():
        for name in names:
            yield modality, name


def windows_of(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """Lists of up to `size` rows, fewer where rows hold their media as `data:` URLs.

    Where the file breaks off, what could be read comes before the error.
    """
    window: list[Row] = []
    held = 0
    try:
        for row in rows:
            window.append(row)
            held += sum(len(name) for _, name in media_names(row.sample)) if row.sample else 0
            if len(window) == size or held > _MOST_HELD:
                yield window
                window, held = [], 0
    except DataError:
        if window:
            yield window
        raise
    if window:
        yield window


def with_media(rows: Iterable[Row], read: Callable[[Medium], Found]) -> Iterator[tuple[list[Row], dict[Medium, Found]]]:
    """Windows of rows, each with what `read` said of its media; every medium is read once, in threads."""
    # By prints, for a name may be a `data:` URL of megabytes.
    known: dict[int, Found] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for window in windows_of(rows, _ROWS_AT_ONCE):
            names = dict.fromkeys(medium for row in window if row.sample for medium in media_names(row.sample))
            media = {medium: print_of(*medium) for medium in names}
            new = [medium for medium, key in media.items() if key not in known]
            known.update(zip((media[medium] for medium in new), pool.map(read, new), strict=True))
            yield window, {medium: known[key] for medium, key in media.items()}


def read_medium(verify: Verify, root: Path, limits: MediaLimits, medium: Medium) -> Found:
    """What a medium inside `root` is, read as far as `verify` says, or why it cannot be used.

    Raises:
        MissingDependencyError: it needs a library that is not installed.
    """
    modality, name = medium
    try:
        if modality == "image":
            return read_picture(verify, root, name, max_image_pixels=limits.max_image_pixels)
        return _film(verify, root, limits, name) if modality == "video" else _recording(verify, root, limits, name)
    except DataError as error:
        return str(error)


def read_picture(verify: Verify, root: Path, name: str, *, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Picture:
    """The size of a picture inside `root`, read as far as `verify` says, or why it cannot be used."""
    try:
        if verify == "decode":
            return load_image(name, root=root, max_image_pixels=max_image_pixels).size
        return check_image(name, root=root, max_image_pixels=max_image_pixels)
    except DataError as error:
        return str(error)


def _film(verify: Verify, root: Path, limits: MediaLimits, name: str) -> Film:
    facts = check_video(name, root=root)
    if verify == "header":
        return Film(0, facts.height, facts.width, 0.0)
    used = load_video(
        name,
        root=root,
        fps=limits.fps,
        max_frames=limits.max_frames,
        max_pixels=limits.frame_pixels or _SMALL_FRAME,
        with_audio=limits.use_audio_in_video,
        sampling_rate=limits.sampling_rate,
        max_seconds=limits.max_seconds,
        too_long=limits.too_long,
    )
    count = len(used.frames)
    height, width = used.frames.shape[1:3] if limits.frame_pixels else (facts.height, facts.width)
    if (needed := count * height * width * 3) > MAX_DECODED_BYTES:
        raise DataError(
            f"video {shown(name)!r}: {count} frames of {width} x {height} take {needed} bytes; the limit is "
            f"{MAX_DECODED_BYTES}: set a limit for frames, or scale the film down"
        )
    seconds = used.total_frames / used.fps
    return Film(count, height, width, count / seconds)


def _recording(verify: Verify, root: Path, limits: MediaLimits, name: str) -> Recording:
    facts = check_audio(name, root=root)
    if limits.too_long == "error" and facts.duration > limits.max_seconds:
        raise DataError(
            f"audio file {shown(name)!r} lasts {facts.duration:.0f} s; the limit is {limits.max_seconds:.0f} s: "
            "cut it, or allow more"
        )
    if verify == "header":
        return Recording(0, facts.sampling_rate)
    heard = load_audio(
        name,
        root=root,
        sampling_rate=limits.sampling_rate,
        max_seconds=limits.max_seconds,
        too_long=limits.too_long,
    )
    return Recording(len(heard.samples), heard.sampling_rate)
