"""How long samples are in tokens, media included, as training would see them."""

from collections.abc import Sequence
from typing import Any

from mmpeft.data.box_text import box_convention as box_convention
from mmpeft.data.box_text import spelt_out as spelt_out
from mmpeft.data.checks.opened import Found, Seen
from mmpeft.data.expand import audio_length, picture_length, video_length
from mmpeft.data.labels import label_turns
from mmpeft.data.pictures import Film, Recording
from mmpeft.data.types import Sample

_RATE_DIGITS, _STEPS = 3, 100
"""Decimals of frames a second, and steps of a second of sound, that are told apart: what is much alike is measured
once."""


def token_length(processor: Any, sample: Sample, media: Sequence[Found | None]) -> int:
    """Tokens of a sample; a medium that was not opened counts as one token.

    Raises:
        DataError: a control token in a text, a chat template that does not fit, or a medium that the processor
            does not take.
    """
    tokens = label_turns(processor, sample.turns)
    return len(tokens.input_ids) + sum(medium_length(processor, medium) - 1 for medium in media)


def medium_length(processor: Any, medium: Found | None) -> int:
    """Tokens that a medium takes, by the processor's own count; 1 if it was not opened."""
    match medium:
        case Seen(width=width, height=height):
            return picture_length(processor, (width, height))
        case Film(frames=frames, height=height, width=width, fps=fps):
            return video_length(processor, (frames, height, width), round(fps, _RATE_DIGITS))
        case Recording(samples=samples, sampling_rate=rate):
            step = max(1, rate // _STEPS)
            return audio_length(processor, -(-samples // step) * step, rate)
    return 1
