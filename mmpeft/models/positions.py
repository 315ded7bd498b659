"""Positions of a packed row, as the family computes them from the padded batch."""

import inspect
from typing import Any

from mmpeft.models.base import base_of


def with_positions(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A packed batch with `position_ids`, where it holds a padded one to compute them from.

    Args:
        model: a transformers model, or a `PeftModel` around one.
        batch: what `PackedCollator` gives; `padded` is taken out.

    Returns:
        The batch with `position_ids` [3, 1, row] (time, height, width) where the family has such positions.
    """
    if "padded" not in batch:
        return batch
    rest = {key: value for key, value in batch.items() if key != "padded"}
    # On the host: families read grids and bounds of pictures number by number.
    padded = dict(batch["padded"].values)
    index = padded.pop("index")
    base: Any = base_of(model)
    # Under the names that the base's forward has for them.
    if "feature_attention_mask" in padded:
        padded["audio_seqlens"] = padded["feature_attention_mask"].sum(-1)
    if "video_second_per_grid" in padded:
        padded["second_per_grids"] = padded["video_second_per_grid"]
    place = base.model.get_rope_index
    known = inspect.signature(place).parameters
    positions, _ = place(**{key: value for key, value in padded.items() if key in known})
    row = positions.flatten(-2)[..., index].unsqueeze(-2)
    return {**rest, "position_ids": row.to(batch["input_ids"].device, non_blocking=True)}
