"""From what the modules of a projector take to what a model's `get_..._features` gives.

For families whose own methods read more of the tower's output, or of the pixels, than the projector's input.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.vision_utils import get_vision_window_index

from mmpeft.core.types import Modality

Inputs = Mapping[str, torch.Tensor]
"""What each module of the projector takes, by the module's path."""


def one_projector(base: Any, modality: Modality, inputs: Inputs, call: Mapping[str, Any]) -> dict[str, Any]:
    """A projector in one module, whose output is a tensor [pictures or tiles, tokens, channels]."""
    ((path, taken),) = inputs.items()
    return {"pooler_output": base.get_submodule(path)(taken)}


def one_row(base: Any, modality: Modality, inputs: Inputs, call: Mapping[str, Any]) -> dict[str, Any]:
    """The same, in a list whose tensors [tokens, channels] the model puts in one row."""
    return {"pooler_output": [one_projector(base, modality, inputs, call)["pooler_output"].flatten(0, 1)]}


def qwen_merger(base: Any, modality: Modality, inputs: Inputs, call: Mapping[str, Any]) -> dict[str, Any]:
    """The Qwen line, whose projectors lie inside their towers.

    The windows of Qwen2.5's tower have their order undone behind the merger. Qwen3-VL has mergers of lower layers too.
    """
    if modality == "audio":
        heard = base.model.audio_tower.proj(inputs["model.audio_tower.proj"])
        return {"last_hidden_state": heard, "pooler_output": heard}
    tower = base.model.visual
    merged = tower.merger(inputs["model.visual.merger"])
    if hasattr(tower, "window_size"):
        order, _ = get_vision_window_index(
            call[f"{modality}_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        merged = merged[torch.argsort(order), :]
    found: dict[str, Any] = {"pooler_output": [merged]}
    if hasattr(tower, "deepstack_merger_list"):
        found["deepstack_features"] = [
            [merger(inputs[f"model.visual.deepstack_merger_list.{number}"])]
            for number, merger in enumerate(tower.deepstack_merger_list)
        ]
    return found
