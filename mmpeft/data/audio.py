"""Recordings: mono float32 at the sampling rate that is asked for, of bounded length.

soundfile reads wav, flac, ogg and mp3; PyAV reads the others (m4a) and the audio track of a film.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpeft.core.errors import DataError
from mmpeft.core.optional import require
from mmpeft.data.containers import check_file, check_streams, opened
from mmpeft.data.embedded import shown
from mmpeft.data.roots import MediaFile, resolve_inside
from mmpeft.data.types import Audio

TooLong = Literal["error", "cut"]
"""What is done with a recording longer than the limit: refused, or its end left out."""

MAX_SECONDS = 600.0
"""Seconds of the longest recording that is decoded, unless the caller says otherwise."""

MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1_000, 768_000
_KIND, _EXTRA = "audio file", "audio"
_BLOCK = 65_536
_PADDING = 4096
"""Samples that an encoder may have added to fill its last packet: a recording is not too long for these."""


@dataclass(frozen=True, kw_only=True)
class AudioFacts:
    """What a recording is, as stored.

    Attributes:
        duration: seconds; 0 where the header does not say.
        sampling_rate: samples a second.
        channels: 1 mono, 2 stereo.
    """

    duration: float
    sampling_rate: int
    channels: int


def check_audio(name: str | Path, *, root: Path) -> AudioFacts:
    """What a recording is, from its header.

    Raises:
        DataError: as `resolve_inside`; or the file is empty, truncated, corrupt, or has no sound in it.
        MissingDependencyError: soundfile, or PyAV for what it cannot read, is not installed.
    """
    path, text = resolve_inside(name, root=root, kind=_KIND), shown(name)
    if (sound := _sound_file(path, text)) is not None:
        with sound:
            return AudioFacts(
                duration=sound.frames / sound.samplerate, sampling_rate=sound.samplerate, channels=sound.channels
            )
    with opened(path, text, kind=_KIND, extra=_EXTRA) as container:
        stream = _audio_stream(container, text)
        seconds = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
        return AudioFacts(duration=float(seconds), sampling_rate=int(stream.rate), channels=int(stream.channels))


def load_audio(
    name: str | Path,
    *,
    root: Path,
    sampling_rate: int = 16_000,
    max_seconds: float = MAX_SECONDS,
    too_long: TooLong = "error",
) -> Audio:
    """A recording, decoded: channels averaged, resampled, values beyond full scale clipped to -1 and 1.

    Args:
        name: the recording's name, inside `root`.
        root: the media root.
        sampling_rate: samples a second of what is returned.
        max_seconds: length limit; no more than this is ever decoded.
        too_long: what is done with a longer one.

    Raises:
        DataError: as `check_audio`; or the recording is longer than the limit, or its samples are not finite.
        MissingDependencyError: soundfile, PyAV or soxr is needed and not installed.
    """
    path, text = resolve_inside(name, root=root, kind=_KIND), shown(name)
    if (sound := _sound_file(path, text)) is None:
        return _with_av(path, text, sampling_rate, max_seconds, too_long)
    with sound:
        _check_rate(sound.samplerate, sound.channels, text)
        if sound.frames > max_seconds * sound.samplerate and too_long == "error":
            raise _longer(text, max_seconds, sound.frames / sound.samplerate)
        limit = int(max_seconds * sound.samplerate)
        try:
            blocks = sound.blocks(_BLOCK, frames=min(limit, sound.frames), dtype="float32", always_2d=True)
            mono = [block.mean(axis=1) for block in blocks]
        # soundfile raises its own error and, for some truncated files, others.
        except (RuntimeError, OSError, ValueError) as error:
            raise DataError(f"{_KIND} {text!r} is corrupt or truncated ({error}); replace it") from error
        return _finish(mono, sound.samplerate, sampling_rate, text)


def audio_of_video(
    name: str | Path,
    *,
    root: Path,
    sampling_rate: int = 16_000,
    max_seconds: float = MAX_SECONDS,
    too_long: TooLong = "error",
) -> Audio:
    """The audio track of a film; arguments and errors as `load_audio`, and an error where there is no track."""
    path = resolve_inside(name, root=root, kind=_KIND)
    return _with_av(path, shown(name), sampling_rate, max_seconds, too_long)


def _sound_file(path: MediaFile, name: str) -> Any | None:
    """The recording opened by soundfile; None if soundfile does not know its format."""
    check_file(path, name, _KIND)
    with path.open("rb") as file:
        prefix = file.read(12)
    if prefix[4:8] == b"ftyp" or prefix[:4] == b"\x1aE\xdf\xa3":
        return None
    if prefix[:4] == b"RIFF" and prefix[8:12] == b"WAVE":
        claimed = int.from_bytes(prefix[4:8], "little")
        # Writers that stream leave 0 or the largest number there.
        if path.stat().st_size < claimed < 0xFFFF_FF00:
            raise DataError(f"{_KIND} {name!r} is truncated: {path.stat().st_size} bytes of {claimed + 8}; replace it")
    soundfile = require("soundfile", extra=_EXTRA)
    try:
        return soundfile.SoundFile(str(path) if isinstance(path, Path) else path.open("rb"))
    except soundfile.LibsndfileError:
        return None


def _with_av(path: MediaFile, name: str, sampling_rate: int, max_seconds: float, too_long: TooLong) -> Audio:
    with opened(path, name, kind=_KIND, extra=_EXTRA) as container:
        stream = _audio_stream(container, name)
        rate = int(stream.rate)
        _check_rate(rate, int(stream.channels), name)
        limit = int(max_seconds * rate)
        mono: list[np.ndarray] = []
        count = 0
        for block in _blocks(container, stream):
            mono.append(block)
            count += len(block)
            if count > limit + _PADDING:
                break
    if count > limit + _PADDING and too_long == "error":
        raise _longer(name, max_seconds, None)
    if count > limit:
        mono = [np.concatenate(mono)[:limit]]
    return _finish(mono, rate, sampling_rate, name)


def _blocks(container: Any, stream: Any) -> Iterator[np.ndarray]:
    """Mono float32 [samples], frame by frame."""
    av = require("av", extra=_EXTRA)
    resampler = av.AudioResampler(format="fltp")
    for frame in container.decode(stream):
        for planar in resampler.resample(frame):
            yield planar.to_ndarray().mean(axis=0)


def _audio_stream(container: Any, name: str) -> Any:
    check_streams(container, name, _KIND)
    stream = next(iter(container.streams.audio), None)
    if stream is None:
        raise DataError(f"{_KIND} {name!r} has no audio track; name another file, or leave it out of `audios`")
    if stream.codec_context is None:
        raise DataError(f"{_KIND} {name!r} is in a codec that PyAV cannot decode; convert it to wav")
    return stream


def _check_rate(rate: int, channels: int, name: str) -> None:
    if not MIN_RATE <= rate <= MAX_RATE or channels > MAX_CHANNELS:
        raise DataError(
            f"{_KIND} {name!r} has {channels} channels at {rate} Hz; expected at most {MAX_CHANNELS} channels at "
            f"{MIN_RATE} to {MAX_RATE} Hz: convert it"
        )


def _longer(name: str, max_seconds: float, seconds: float | None) -> DataError:
    found = "lasts longer" if seconds is None else f"lasts {seconds:.1f} s"
    return DataError(
        f"{_KIND} {name!r} {found}; the limit is {max_seconds:g} s: cut it, raise the limit, or set too_long to 'cut'"
    )


def _finish(mono: list[np.ndarray], rate: int, sampling_rate: int, name: str) -> Audio:
    samples = np.concatenate(mono) if mono else np.empty(0, np.float32)
    if samples.size == 0:
        raise DataError(f"{_KIND} {name!r} holds no sound (zero length); replace it, or remove its sample")
    if not np.isfinite(samples).all():
        raise DataError(f"{_KIND} {name!r} has samples that are NaN or infinite; save it again with whole numbers")
    if rate != sampling_rate:
        samples = require("soxr", extra=_EXTRA).resample(samples, rate, sampling_rate)
    return Audio(samples=np.clip(samples, -1, 1).astype(np.float32, copy=False), sampling_rate=sampling_rate)
