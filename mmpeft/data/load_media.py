"""A sample's media, decoded within limits; runs in the workers of a DataLoader, and in threads."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmpeft.data.audio import MAX_SECONDS, AudioFacts, TooLong, check_audio, load_audio
from mmpeft.data.boxes import relative_values
from mmpeft.data.media import MAX_IMAGE_PIXELS, check_image, load_image, upright_sizes
from mmpeft.data.types import Audio, Media, Question, Sample, Video
from mmpeft.data.video import VideoFacts, check_video, load_video


@dataclass(frozen=True, kw_only=True)
class MediaLimits:
    """How much of each medium is decoded.

    Attributes:
        max_image_pixels: largest picture that is decoded, width x height.
        fps: frames a second of a film that are used at most; None for no such limit.
        max_frames: frames of a film that are used at most.
        frame_pixels: width x height to which frames are scaled down; None to leave them.
        sampling_rate: samples a second of recordings.
        max_seconds: seconds of the longest recording or audio track.
        too_long: whether longer ones are an error or are cut.
        use_audio_in_video: decode the audio tracks of films; a film without one is silent then.
    """

    max_image_pixels: int = MAX_IMAGE_PIXELS
    fps: float | None = 2.0
    max_frames: int = 64
    frame_pixels: int | None = None
    sampling_rate: int = 16_000
    max_seconds: float = MAX_SECONDS
    too_long: TooLong = "error"
    use_audio_in_video: bool = False


@dataclass(frozen=True, kw_only=True)
class MediaFacts:
    """What a sample's media are, by their headers, in the order of their placeholders; pictures as (width, height)."""

    images: tuple[tuple[int, int], ...] = ()
    videos: tuple[VideoFacts, ...] = ()
    audios: tuple[AudioFacts, ...] = ()


def load_media(sample: Sample | Question, *, root: Path, limits: MediaLimits) -> Media:
    """A sample's pictures, films and recordings, decoded, each in the order of its placeholders.

    Raises:
        DataError: a medium is missing, outside `root`, unreadable or beyond the limits; names it.
        MissingDependencyError: a medium needs a library that is not installed.
    """
    return Media(
        images=tuple(load_image(name, root=root, max_image_pixels=limits.max_image_pixels) for name in sample.images),
        videos=tuple(_film(name, root, limits) for name in sample.videos),
        audios=tuple(
            load_audio(
                name,
                root=root,
                sampling_rate=limits.sampling_rate,
                max_seconds=limits.max_seconds,
                too_long=limits.too_long,
            )
            for name in sample.audios
        ),
    )


def placed(sample: Sample, *, root: Path, limits: MediaLimits) -> Sample:
    """The sample with its boxes as shares of their pictures, which hold whatever size a picture is decoded at.

    Raises:
        DataError: a box that is none, or lies outside its picture; names the box.
    """
    used = {box.picture for box in sample.boxes}
    sizes = {
        number: upright_sizes(sample.images[number], root=root, max_image_pixels=limits.max_image_pixels)[0]
        for number in used
    }
    boxes = tuple(
        replace(box, values=relative_values(box, size=sizes[box.picture]), unit="fraction") for box in sample.boxes
    )
    return replace(sample, boxes=boxes)


def _film(name: str, root: Path, limits: MediaLimits) -> Video:
    film = load_video(
        name,
        root=root,
        fps=limits.fps,
        max_frames=limits.max_frames,
        max_pixels=limits.frame_pixels,
        with_audio=limits.use_audio_in_video,
        sampling_rate=limits.sampling_rate,
        max_seconds=limits.max_seconds,
        too_long=limits.too_long,
    )
    if film.audio is not None or not limits.use_audio_in_video:
        return film
    # A forward takes the films of a batch all with sound or all without: one that has none is silent.
    seconds = min(film.total_frames / film.fps, limits.max_seconds)
    silence = np.zeros(max(1, round(seconds * limits.sampling_rate)), dtype=np.float32)
    return replace(film, audio=Audio(samples=silence, sampling_rate=limits.sampling_rate))


def check_media(sample: Sample, *, root: Path, limits: MediaLimits) -> MediaFacts:
    """What a sample's media are, by their headers alone; errors as `load_media`, save those of the pixels."""
    return MediaFacts(
        images=tuple(check_image(name, root=root, max_image_pixels=limits.max_image_pixels) for name in sample.images),
        videos=tuple(check_video(name, root=root) for name in sample.videos),
        audios=tuple(check_audio(name, root=root) for name in sample.audios),
    )
