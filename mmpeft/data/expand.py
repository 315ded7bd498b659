"""What takes the place of a picture, video or recording in the text, and its tensors: the processor's own answer.

The processor of transformers 5.24 replaces each medium's token by as many as the medium has features, between
tokens of its own (tile rows, timestamps), and says what it wrote where. Only the text is tokenised again here, so
that labels can be told apart by character.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import Modality
from mmpeft.data.chat import control_tokens
from mmpeft.data.types import Audio, Media, Video
from mmpeft.families.registry import family_of_processor

Encoded = dict[str, torch.Tensor]
"""`input_ids` and `labels` LongTensor [sequence], and tensors of media, as the model's forward names them."""

_TEXT_KEYS = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "text_replacement_offsets"}
)
AUDIO_IN_VIDEO = "use_audio_in_video"
"""An argument of the forward, for a whole batch: films and their audio tracks share positions."""

_OFFSETS = "text_replacement_offsets"
_PROBES = ((16, 16), (48, 32), (64, 64), (512, 512), (640, 64), (64, 640))
_CACHED_SIZES = 4096


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """What the processor makes of a sample's media.

    Attributes:
        replacements: the text that takes the place of each medium's token, in order.
        tensors: what the forward takes beside the text.
        modalities: of each replacement.
    """

    replacements: tuple[str, ...]
    tensors: Encoded
    modalities: tuple[Modality, ...] = ()


def expand(processor: Any, text: str, media: Media) -> Expansion:
    """Run the processor over a text and its media.

    Args:
        text: a conversation with one token a medium.
        media: as many as there are tokens, each modality in the order of its own.

    Raises:
        DataError: the processor refuses a medium (a picture too thin for its patches, say), or these together.
        ModelError: it does not say what it wrote in the place of a medium.
    """
    given = _arguments(media)
    if not given:
        return Expansion(replacements=(), tensors={})
    spec = family_of_processor(processor)
    if media.images and media.videos and spec is not None and not spec.mixes_media:
        raise DataError(
            f"it holds pictures and videos, which {type(processor).__name__} takes in separate samples only; split it"
        )
    try:
        found = processor(text=[text], return_text_replacement_offsets=True, return_tensors="pt", **given)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise DataError(f"{type(processor).__name__} refuses its media: {error}") from error
    if "video_second_per_grid" in found and not _shown_alike(media.videos):
        raise DataError(
            f"{type(processor).__name__} takes films of one frame rate in a sample, and its films are shown at unlike "
            "ones; lower data.media.fps until all have it, or split the sample"
        )
    if _OFFSETS not in found:
        raise ModelError(
            f"{type(processor).__name__} does not say what it writes in the place of a medium; this needs a processor "
            "that takes return_text_replacement_offsets (transformers 5.24)"
        )
    written = found[_OFFSETS][0]
    tensors = {key: _tensor(value) for key, value in found.items() if key not in _TEXT_KEYS}
    if "load_audio_from_video" in given:
        tensors[AUDIO_IN_VIDEO] = torch.tensor(True)
    return Expansion(
        replacements=tuple(item["replacement"] for item in written),
        modalities=tuple(item["type"] for item in written),
        tensors=tensors,
    )


def _arguments(media: Media) -> dict[str, Any]:
    """Media as a processor's call takes them, without what is not there."""
    given: dict[str, Any] = {}
    if media.images:
        given["images"] = [list(media.images)]
    if media.videos:
        given["videos"] = [[torch.from_numpy(video.frames).permute(0, 3, 1, 2) for video in media.videos]]
        metadata = [_metadata(video) for video in media.videos]
        given["videos_kwargs"] = {
            "do_sample_frames": False,
            "video_metadata": [metadata],
            # Qwen2.5-Omni takes the time between frames from here, not from the metadata.
            "fps": metadata[0].sampled_fps,
        }
    tracks = [(index, video.audio) for index, video in enumerate(media.videos) if video.audio is not None]
    recordings = [*media.audios, *(audio for _, audio in tracks)]
    if recordings:
        given["audio"] = [audio.samples for audio in recordings]
        given["audio_kwargs"] = {"sampling_rate": recordings[0].sampling_rate}
    if tracks:
        given["load_audio_from_video"] = True
        given["audio_from_video_indices"] = [None] * len(media.audios) + [index for index, _ in tracks]
    return given


def _metadata(video: Video) -> VideoMetadata:
    return VideoMetadata(
        total_num_frames=video.total_frames,
        fps=video.fps,
        width=video.frames.shape[2],
        height=video.frames.shape[1],
        duration=video.total_frames / video.fps,
        frames_indices=list(video.indices),
    )


def _shown_alike(videos: Sequence[Video]) -> bool:
    rates = [_metadata(video).sampled_fps for video in videos]
    return max(rates) <= 1.01 * min(rates)


def _tensor(value: Any) -> torch.Tensor:
    """A value of a processor's output as one tensor; tensors in a list are stacked."""
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, Sequence) and value and isinstance(value[0], torch.Tensor | np.ndarray):
        return torch.stack([torch.as_tensor(item) for item in value])
    return torch.as_tensor(value)


def picture_length(processor: Any, size: tuple[int, int]) -> int:
    """Tokens that a picture of (width, height) pixels takes, without its pixels."""
    fixed = fixed_picture_length(processor)
    return _picture_length(processor, size) if fixed is None else fixed


@functools.lru_cache(maxsize=16)
def fixed_picture_length(processor: Any) -> int | None:
    """Tokens of any picture, where pictures of very unlike shapes all take the same number; else None."""
    lengths = {_picture_length(processor, size) for size in _PROBES}
    return lengths.pop() if len(lengths) == 1 else None


@functools.lru_cache(maxsize=_CACHED_SIZES)
def _picture_length(processor: Any, size: tuple[int, int]) -> int:
    return _length(processor, "image", Media(images=[Image.new("RGB", size)]))


def picture_lengths(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that each of the pictures of one sample takes; in some families another number than it takes alone."""
    alone = [picture_length(processor, size) for size in sizes]
    if len(sizes) < 2 or not _encoded_together(processor):
        return alone
    return list(_lengths_together(processor, tuple(sizes)))


@functools.lru_cache(maxsize=16)
def _encoded_together(processor: Any) -> bool:
    pair = _PROBES[-3:-1]
    return _lengths_together(processor, pair) != tuple(picture_length(processor, size) for size in pair)


@functools.lru_cache(maxsize=_CACHED_SIZES)
def _lengths_together(processor: Any, sizes: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    media = Media(images=[Image.new("RGB", size) for size in sizes])
    expansion = expand(processor, control_tokens(processor).media["image"] * len(sizes), media)
    texts = expansion.replacements
    return tuple(len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


@functools.lru_cache(maxsize=_CACHED_SIZES)
def video_length(processor: Any, shape: tuple[int, int, int], fps: float) -> int:
    """Tokens that a video of (frames, height, width), shown at `fps` frames a second, takes."""
    frames = np.zeros((*shape, 3), dtype=np.uint8)
    video = Video(frames=frames, indices=tuple(range(shape[0])), fps=fps, total_frames=shape[0])
    return _length(processor, "video", Media(videos=[video]))


@functools.lru_cache(maxsize=_CACHED_SIZES)
def audio_length(processor: Any, samples: int, sampling_rate: int) -> int:
    """Tokens that a recording of so many samples takes."""
    silence = Audio(samples=np.zeros(samples, dtype=np.float32), sampling_rate=sampling_rate)
    return _length(processor, "audio", Media(audios=[silence]))


def _length(processor: Any, modality: Modality, media: Media) -> int:
    expansion = expand(processor, control_tokens(processor).media[modality], media)
    return len(processor.tokenizer(expansion.replacements[0], add_special_tokens=False)["input_ids"])
