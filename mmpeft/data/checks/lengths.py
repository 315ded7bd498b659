"""How long samples are in tokens, media included, and whether training would leave anything of their answers."""

from collections.abc import Sequence
from typing import Any

from mmpeft.data.box_text import box_convention as box_convention
from mmpeft.data.box_text import spelt_out as spelt_out
from mmpeft.data.chat import control_tokens
from mmpeft.data.checks.opened import Found, Seen
from mmpeft.data.encode import cut_before_media
from mmpeft.data.labels import LabelledTokens, label_turns
from mmpeft.data.lengths import media_lengths, stretched
from mmpeft.data.types import Sample


def sample_tokens(processor: Any, sample: Sample, media: Sequence[Found | None]) -> LabelledTokens:
    """The tokens of a sample as training has them; where a medium was not opened, each medium as one token.

    Raises:
        DataError: a control token in a text, a chat template that does not fit, or a medium that the processor does
            not take.
    """
    tokens = label_turns(processor, sample.turns)
    sizes = [(medium.width, medium.height) if isinstance(medium, Seen) else medium for medium in media]
    readable = [medium for medium in sizes if medium is not None and not isinstance(medium, str)]
    lengths = media_lengths(processor, readable) or []
    return stretched(processor, tokens, lengths) if len(lengths) == len(media) else tokens


def check_cut(processor: Any, tokens: LabelledTokens, max_length: int) -> None:
    """See that a cut to `max_length` leaves something of an answer.

    Raises:
        DataError: it does not.
    """
    cut_before_media(tokens, max_length, control_tokens(processor).ids)
