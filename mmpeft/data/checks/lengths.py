"""How long samples are in tokens, pictures included, as training would see them."""

from collections.abc import Sequence
from typing import Any

from mmpeft.data.expand import picture_length
from mmpeft.data.labels import label_turns
from mmpeft.data.types import Sample


def token_length(processor: Any, sample: Sample, sizes: Sequence[tuple[int, int]]) -> int:
    """Tokens of a sample; a medium without its size in `sizes` counts as one token.

    Raises:
        DataError: a control token in a text, or a chat template that does not fit.
    """
    tokens = label_turns(processor, sample.turns)
    return len(tokens.input_ids) + sum(picture_length(processor, size) - 1 for size in sizes)
