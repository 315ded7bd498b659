"""Films: the frames that are used, picked by time, reached by seeking, scaled as they are decoded.

packets   K . . . . . K . . . . . K . . . . .     read once, none decoded: time and place of every frame
used          ^           ^                       uniform in time
decoded   K . .       K . .                       from the key frame before each, no further than it
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mmpeft.core.errors import DataError
from mmpeft.data.audio import MAX_SECONDS, TooLong, audio_of_video
from mmpeft.data.containers import check_streams, opened
from mmpeft.data.embedded import shown
from mmpeft.data.roots import resolve_inside
from mmpeft.data.types import Video

MAX_FRAME_PIXELS = 8192 * 4320
"""Pixels (width x height) of the largest frame that is decoded."""

MAX_DECODED_BYTES = 2 * 2**30
"""Bytes of RGB that one film's used frames may take together."""

SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers with exact times and an index; others (AVI, MPEG-TS) are decoded up to the last frame used."""

_MISSING_SHARE = 0.05
_EXTRA = "video"


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """What a film is.

    Attributes:
        duration: seconds; 0 where the header does not say.
        fps: frames a second, on average.
        frames: frames by the header, or by duration and fps where it does not count them.
        width, height: pixels of a frame, upright.
        has_audio: whether there is an audio track.
    """

    duration: float
    fps: float
    frames: int
    width: int
    height: int
    has_audio: bool


def check_video(name: str | Path, *, root: Path) -> VideoFacts:
    """What a film is, from its header and its first frame (which alone says how the film is rotated).

    Raises:
        DataError: as `resolve_inside`; or the file is empty, too large, corrupt, or has no picture in it.
        MissingDependencyError: PyAV is not installed.
    """
    path, text = resolve_inside(name, root=root, kind="video"), shown(name)
    with opened(path, text, kind="video", extra=_EXTRA) as container:
        stream = _video_stream(container, text)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise _no_frames(text)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        duration = _header_seconds(container, stream)
        width, height = frame.width, frame.height
        if _quarter_turns(frame) % 2:
            width, height = height, width
        return VideoFacts(
            duration=duration,
            fps=fps,
            frames=stream.frames or max(1, round(duration * fps)),
            width=width,
            height=height,
            has_audio=bool(container.streams.audio),
        )


def load_video(
    name: str | Path,
    *,
    root: Path,
    fps: float | None = 2.0,
    max_frames: int = 64,
    max_pixels: int | None = None,
    with_audio: bool = False,
    sampling_rate: int = 16_000,
    max_seconds: float = MAX_SECONDS,
    too_long: TooLong = "error",
) -> Video:
    """The frames of a film that are used: uniform in time, upright, RGB.

    Args:
        name: the film's name, inside `root`.
        root: the media root.
        fps: at most so many frames a second of the film; None for no such limit.
        max_frames: at most so many frames in all; there is always at least one.
        max_pixels: width x height of a frame at most; larger ones are scaled down, keeping their aspect.
        with_audio: decode the audio track too, where there is one.
        sampling_rate, max_seconds, too_long: of the audio track, as in `mmpeft.data.audio.load_audio`.

    Raises:
        DataError: as `check_video`; or the film is truncated, a frame cannot be decoded, or the frames together
            would take more than `MAX_DECODED_BYTES`.
        MissingDependencyError: PyAV is not installed.
    """
    if max_frames < 1 or (fps is not None and not fps > 0) or (max_pixels is not None and max_pixels < 1):
        raise DataError(f"fps ({fps}), max_frames ({max_frames}) and max_pixels ({max_pixels}) must be positive")
    path, text = resolve_inside(name, root=root, kind="video"), shown(name)
    with opened(path, text, kind="video", extra=_EXTRA) as container:
        stream = _video_stream(container, text)
        times, keys, last = _times(container, stream, text)
        span = times[-1] - times[0] + last
        seconds = float(span * stream.time_base)
        indices = _pick(times, span, seconds, fps, max_frames)
        rate = float(stream.average_rate or 0) or len(times) / seconds
        has_audio = bool(container.streams.audio)
    with opened(path, text, kind="video", extra=_EXTRA) as container:
        stream = _video_stream(container, text)
        if container.format.name in SEEKABLE:
            used = _decoded(container, stream, times[indices], keys, text)
        else:
            used = _from_the_start(container, stream, indices)
        frames = _collect(used, len(indices), max_pixels, text)
    audio = None
    if with_audio and has_audio:
        audio = audio_of_video(name, root=root, sampling_rate=sampling_rate, max_seconds=max_seconds, too_long=too_long)
    return Video(frames=frames, indices=tuple(int(i) for i in indices), fps=rate, total_frames=len(times), audio=audio)


def _video_stream(container: Any, name: str) -> Any:
    """The film's own video stream (not its cover picture), of a size within the limit."""
    check_streams(container, name, "video")
    streams = [stream for stream in container.streams.video if "attached_pic" not in str(stream.disposition)]
    if not streams:
        raise DataError(f"video {name!r} has no video stream; if it is a recording, name it as audio")
    stream = streams[0]
    if stream.codec_context is None:
        raise DataError(f"video {name!r} is in a codec that PyAV cannot decode; convert it to H.264 in mp4")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_FRAME_PIXELS:
        raise DataError(f"video {name!r} is {width} x {height}; the limit is {MAX_FRAME_PIXELS} pixels: scale it down")
    return stream


def _no_frames(name: str) -> DataError:
    return DataError(f"video {name!r} holds no frame (zero length); replace it, or remove its sample")


def _header_seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1_000_000


def _times(container: Any, stream: Any, name: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Times of all frames, and of the key frames, in ticks and in order; and how many ticks the last one lasts."""
    times: list[int] = []
    keys: list[int] = []
    ticks = 0
    for packet in container.demux(stream):
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or packet.size == 0 or packet.is_discard:
            continue
        times.append(time)
        ticks = packet.duration or ticks
        if packet.is_keyframe:
            keys.append(time)
    if not times:
        raise _no_frames(name)
    if len(times) < stream.frames * (1 - _MISSING_SHARE):
        raise DataError(
            f"video {name!r} is truncated: its header says {stream.frames} frames, {len(times)} are there; replace it"
        )
    promised = _header_seconds(container, stream)
    there = float((max(times) - min(times) + ticks) * stream.time_base)
    if promised and there < promised / 2 - 1 and not container.streams.audio:
        raise DataError(
            f"video {name!r} is truncated: its header says {promised:.1f} s, {there:.1f} s are there; replace it"
        )
    if not ticks:
        ticks = max(1, round(1 / (stream.average_rate * stream.time_base))) if stream.average_rate else 1
    return np.unique(times), np.unique(keys or times[:1]), int(ticks)


def _pick(times: np.ndarray, span: int, seconds: float, fps: float | None, max_frames: int) -> np.ndarray:
    """Indices of the frames that are on display at the starts of equal shares of the film."""
    count = len(times) if fps is None else max(1, int(seconds * fps + 1e-6))
    count = min(count, max_frames, len(times))
    moments = times[0] + int(span) * np.arange(count, dtype=object) // count
    return np.unique(np.searchsorted(times, moments.astype(np.int64), side="right") - 1)


def _collect(used: Iterator[Any], count: int, max_pixels: int | None, name: str) -> np.ndarray:
    """The `count` frames of `used`, uint8 [frames, height, width, 3], scaled and upright."""
    frames: np.ndarray | None = None
    place = -1
    for place, frame in enumerate(used):
        if frames is None:
            size = _fit(frame.width, frame.height, max_pixels)
            turns = _quarter_turns(frame)
            width, height = size if turns % 2 == 0 else size[::-1]
            needed = count * width * height * 3
            if needed > MAX_DECODED_BYTES:
                raise DataError(
                    f"video {name!r}: {count} frames of {width} x {height} take {needed} bytes; the limit is "
                    f"{MAX_DECODED_BYTES}: set max_pixels, or fewer max_frames"
                )
            frames = np.empty((count, height, width, 3), dtype=np.uint8)
        # The size of the first frame holds for all: in some streams it changes half-way.
        pixels = frame.reformat(width=size[0], height=size[1], format="rgb24", interpolation="BICUBIC").to_ndarray()
        frames[place] = np.rot90(pixels, turns)
    if frames is None or place + 1 < count:
        raise DataError(f"video {name!r} ends after {place + 1} of the {count} frames used; it is corrupt: replace it")
    return frames


def _decoded(container: Any, stream: Any, wanted: np.ndarray, keys: np.ndarray, name: str) -> Iterator[Any]:
    """The frame at each wanted time, in order, decoding only from the key frame before it."""
    at, following = None, iter(())
    for time in (int(value) for value in wanted):
        key = int(keys[max(0, int(np.searchsorted(keys, time, side="right")) - 1)])
        if at is None or key > at:
            following = _from(container, stream, key)
        frame = _first_at(following, time)
        if frame is None or frame.pts != time:
            # A damaged index can lead behind the key frame: read from the start.
            following = _from(container, stream, None)
            frame = _first_at(following, time)
        if frame is None:
            raise DataError(
                f"video {name!r} ends before its frame at {float(time * stream.time_base):.3f} s; it is "
                "truncated or corrupt: replace it"
            )
        if frame.is_corrupt:
            raise DataError(f"video {name!r} is corrupt at {float(time * stream.time_base):.3f} s; replace it")
        at = int(frame.pts)
        yield frame


def _from_the_start(container: Any, stream: Any, indices: np.ndarray) -> Iterator[Any]:
    """The frames at `indices`, by counting: packets without exact times cannot be matched to frames."""
    wanted = {int(index) for index in indices}
    for index, frame in enumerate(container.decode(stream)):
        if index in wanted:
            yield frame
        if index == indices[-1]:
            return


def _from(container: Any, stream: Any, time: int | None) -> Iterator[Any]:
    """Frames in order, from the key frame at or before `time`, or from the start."""
    if time is None:
        container.seek(int(stream.start_time or 0), stream=stream, backward=True, any_frame=False)
    else:
        container.seek(time, stream=stream, backward=True, any_frame=False)
    return iter(container.decode(stream))


def _first_at(frames: Iterator[Any], time: int) -> Any:
    return next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)


def _fit(width: int, height: int, max_pixels: int | None) -> tuple[int, int]:
    """Size of a frame of at most `max_pixels`, with the same aspect as far as whole pixels allow."""
    if max_pixels is None or width * height <= max_pixels:
        return width, height
    scale = sqrt(max_pixels / (width * height))
    small = max(1, int(min(width, height) * scale))
    large = min(max(1, int(max(width, height) * scale)), max(1, max_pixels // small))
    return (large, small) if width >= height else (small, large)


def _quarter_turns(frame: Any) -> int:
    """Quarter turns anticlockwise that set a frame upright, by its display matrix."""
    return round((frame.rotation or 0) / 90) % 4
