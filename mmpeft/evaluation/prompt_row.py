"""Prompts as one row, so that questions on a picture run it, and all that they begin with, once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.encode import Encoded
from mmpeft.data.packing import PackedCollator, plan_packing
from mmpeft.families.registry import family_of
from mmpeft.models.positions import with_positions


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """Prompts ready for one forward under `tree_attention_on`.

        row       p p p p a a b b b        two questions on a picture
        order     0 1
        index     0 1 2 3 4 5 .
                  0 1 2 3 6 7 8
        last      5 8

    Attributes:
        inputs: of the forward.
        order: the prompts, by their place among those given, as they stand in the row; what follows goes by it.
        index: LongTensor [prompts, longest], where each prompt's tokens stand in the row.
        lengths: tokens of each prompt.
        following: LongTensor [prompts], the position of each answer's first token.
        last: LongTensor [prompts], where each prompt's last token stands in the row.
    """

    inputs: dict[str, Any]
    order: tuple[int, ...]
    index: torch.Tensor
    lengths: tuple[int, ...]
    following: torch.Tensor
    last: torch.Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the row."""
        return int(self.inputs["input_ids"].shape[1])


def lay_out(model: Any, processor: Any, prompts: Sequence[Encoded]) -> PromptRow:
    """Put prompts into one row.

    Args:
        model: of a family that can be packed.
        prompts: what `encode_prompt` gives.
    """
    rows = [{**prompt, "labels": _last_alone(prompt["input_ids"])} for prompt in prompts]
    collate = PackedCollator(processor)
    packing = plan_packing(rows, collate.media_ids, two_way=collate.two_way)
    inputs = with_positions(model, collate(rows))
    for key in ("labels", "shift_labels", "logits_to_keep"):
        inputs.pop(key, None)
    shared = {segment.parent for segment in packing.tree.segments}
    places = [
        torch.cat((torch.arange(*(segment.parent or (0, 0))), torch.arange(segment.start, segment.end)))
        for segment in packing.tree.segments
        if (segment.start, segment.end) not in shared
    ]
    last = torch.stack([place[-1] for place in places])
    if family_of(model).supervised_logits:
        inputs["logits_to_keep"] = last
    # Time, height and width, in families that tell them apart, are one for text. An answer goes on from the last token,
    # as in `generate`, and not from the largest position: of Qwen2.5-Omni's films with sound, that can lie behind it.
    positions = inputs["position_ids"].flatten(0, -2)[0]
    return PromptRow(
        inputs=inputs,
        order=packing.order,
        index=pad_sequence(places, batch_first=True),
        lengths=tuple(len(place) for place in places),
        following=positions[last] + 1,
        last=last,
    )


def _last_alone(input_ids: torch.Tensor) -> torch.Tensor:
    """Labels that keep a prompt's end out of what it shares, for what follows is told there."""
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[-1] = input_ids[-1]
    return labels
