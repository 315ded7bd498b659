"""How many tokens a sample takes with its media, without their pixels and sounds."""

from collections.abc import Sequence
from typing import Any

from mmpeft.core.types import IGNORE_INDEX, Modality
from mmpeft.data.chat import control_tokens
from mmpeft.data.expand import audio_length, picture_length, picture_lengths, video_length
from mmpeft.data.labels import LabelledTokens
from mmpeft.data.pictures import Film, Recording

Measured = tuple[int, int] | Film | Recording
"""A medium that can be read; a picture as (width, height)."""

_RATE_DIGITS, _STEPS = 3, 100
"""Decimals of frames a second, and steps of a second of sound, that are told apart: what is much alike is measured
once."""


def medium_length(processor: Any, medium: Measured) -> tuple[Modality, int] | None:
    """A medium's modality and the tokens it takes, by the processor's own count.

    None for a film or a recording of which only the header was read.

    Raises:
        DataError: the processor does not take such a medium.
    """
    match medium:
        case Film(frames=0) | Recording(samples=0):
            return None
        case Film(frames=frames, height=height, width=width, fps=fps):
            return "video", video_length(processor, (frames, height, width), round(fps, _RATE_DIGITS))
        case Recording(samples=samples, sampling_rate=rate):
            step = max(1, rate // _STEPS)
            return "audio", audio_length(processor, -(-samples // step) * step, rate)
        case (width, height):
            return "image", picture_length(processor, (width, height))


def media_lengths(processor: Any, media: Sequence[Measured]) -> list[tuple[Modality, int]] | None:
    """`medium_length` of each, as they are in one sample; None if that of one is not known."""
    found = [medium_length(processor, medium) for medium in media]
    pictures = [place for place, medium in enumerate(media) if not isinstance(medium, Film | Recording)]
    if len(pictures) > 1:
        sizes = [(media[place][0], media[place][1]) for place in pictures]
        for place, length in zip(pictures, picture_lengths(processor, sizes), strict=True):
            found[place] = "image", length
    known = [length for length in found if length is not None]
    return known if len(known) == len(found) else None


def stretched(processor: Any, tokens: LabelledTokens, lengths: Sequence[tuple[Modality, int]]) -> LabelledTokens:
    """The tokens of a conversation, one a medium, as they are once every medium takes as many as it does.

    Args:
        processor: knows by which token each modality is marked.
        tokens: with one token a medium.
        lengths: modality and tokens of each medium; each modality in the order of its placeholders.
    """
    modalities = {token: modality for modality, token in control_tokens(processor).media_ids.items()}
    waiting: dict[Modality, list[int]] = {}
    for modality, length in reversed(lengths):
        waiting.setdefault(modality, []).append(length)
    ids: list[int] = []
    labels: list[int] = []
    media: list[tuple[int, int]] = []
    position = 0
    for start, end in tokens.media:
        length = waiting[modalities[tokens.input_ids[start]]].pop()
        ids += [*tokens.input_ids[position:start], *[tokens.input_ids[start]] * length]
        labels += [*tokens.labels[position:start], *[IGNORE_INDEX] * length]
        media.append((len(ids) - length, len(ids)))
        position = end
    return LabelledTokens(
        input_ids=ids + tokens.input_ids[position:], labels=labels + tokens.labels[position:], media=tuple(media)
    )
