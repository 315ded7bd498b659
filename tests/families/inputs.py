"""What a tiny model of any type is trained on: a picture and text where one can be made, else text.

What a forward takes is read from its signature: each argument beside the pixels has a value by its name (`BESIDE`),
and the pixels are tried in each of the layouts that transformers knows (`_layouts`). As many picture tokens go into
the text as the model's own complaint says that there are features. A picture counts where another one gives another
loss.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from tests.families.shrink import IMAGE, PATCH

Step = Literal["picture", "text"]
Batch = dict[str, Any]

TEXT = tuple(range(1, 13))
GRID = IMAGE // PATCH
FILM = 2

_MERGED = {
    "pixel_values": torch.rand(4, 2 * PATCH, 2 * PATCH, 3),
    "image_grid_thw": torch.tensor([[1, 2, 2]]),
}

BESIDE: Mapping[str, Any] = {
    "image_sizes": torch.tensor([[IMAGE, IMAGE]]),
    "image_grid_thw": torch.tensor([[1, GRID, GRID]]),
    "image_grid_hw": torch.tensor([[GRID, GRID]]),
    "image_merge_sizes": torch.tensor([2]),
    "target_sizes": torch.tensor([[GRID, GRID]], dtype=torch.int32),
    "spatial_shapes": torch.tensor([[GRID, GRID]]),
    "aspect_ratio_ids": torch.tensor([[1]]),
    "aspect_ratio_mask": torch.tensor([[[1]]]),
    "image_position_ids": torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).flip(-1)[None],
    "qformer_input_ids": torch.tensor([[1, 2, 3]]),
    "qformer_attention_mask": torch.ones(1, 3, dtype=torch.long),
}
"""Arguments that go with a square picture of 4 x 4 patches."""

OWN_LAYOUT: Mapping[str, Mapping[str, Any]] = {
    "granite_docling": {
        "pixel_values": torch.rand(1, 1, 3, IMAGE, IMAGE),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    },
    "inkling2": _MERGED,
    "inkling2_loop": _MERGED,
    "inkling_mm_model": {"pixel_values": torch.rand(1, FILM, PATCH, PATCH, 3)},
    "mllama": {
        "pixel_values": torch.rand(1, 1, 4, 3, IMAGE, IMAGE),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
    },
    "molmo2": {
        "pixel_values": torch.rand(1, GRID * GRID, 3 * PATCH * PATCH),
        "image_token_pooling": torch.arange(GRID * GRID).view(4, 4),
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    },
}
"""By model type: pictures that no other type lays out this way."""


@dataclass(frozen=True)
class Inputs:
    """A batch that the model's forward takes, with labels; for a picture step also the same with another picture."""

    step: Step
    batch: Batch
    other: Batch | None = None


def inputs_of(model: PreTrainedModel) -> Inputs:
    """What the model is trained on: the first picture that its forward takes and its loss depends on, else text.

    Raises:
        Exception: what the forward raised on text alone, or that it gives no loss.
    """
    for media in _media(model):
        found = _with_picture(model, media)
        if found is not None:
            return found
    batch = _batch(model, {}, 0)
    _loss(model, batch)
    return Inputs("text", batch)


def _with_picture(model: PreTrainedModel, media: Batch) -> Inputs | None:
    """The media behind as many picture tokens as they have features, if that goes through."""
    counts = [_stated(model), GRID * GRID // 4, GRID * GRID]
    for _ in range(8):
        if not counts:
            return None
        count = counts.pop(0)
        try:
            batch = _batch(model, media, count)
            before = _loss(model, batch)
        except Exception as error:
            features = re.search(r"features:? (\d+)", str(error))
            if features and int(features[1]) not in (0, count):
                hidden = model.config.get_text_config().hidden_size
                counts = [int(features[1]), int(features[1]) // hidden]
            continue
        other = {key: _another(key, value) for key, value in batch.items()}
        return Inputs("picture", batch, other) if _loss(model, other) != before else None
    return None


def _loss(model: PreTrainedModel, batch: Batch) -> float:
    with torch.no_grad():
        loss = model(**batch).loss
    if loss is None:
        raise ValueError(f"the forward of {type(model).__name__} gives no loss")
    return float(loss)


def _another(key: str, value: Any) -> Any:
    """Another picture of the same size; the first two columns of flattened patches are their places."""
    if key == "flattened_patches":
        return torch.cat([value[..., :2], value[..., 2:].flip(1)], -1)
    if key in ("pixel_values", "image_patches", "high_res_pixel_values", "pixel_values_images"):
        return value.flip(0, -1) * 0.5 + 0.3
    return value


def _stated(model: PreTrainedModel) -> int:
    """The number of picture tokens that the configuration states; 1 if it states none."""
    names = ("num_query_tokens", "latent_query_num", "image_seq_length", "num_image_tokens")
    return next((value for name in names if isinstance(value := getattr(model.config, name, None), int)), 1)


def _media(model: PreTrainedModel) -> Iterator[Batch]:
    taken = inspect.signature(model.forward).parameters
    beside = {name: value for name, value in BESIDE.items() if name in taken}
    if model.config.model_type in OWN_LAYOUT:
        yield dict(OWN_LAYOUT[model.config.model_type])
        return
    for pixels in _layouts(model):
        if not set(pixels) <= set(taken):
            continue
        masks = {name: _mask(pixels) for name in ("pixel_mask", "pixel_attention_mask") if name in taken}
        high = {"high_res_pixel_values": torch.rand(1, 3, IMAGE, IMAGE)} if "high_res_pixel_values" in taken else {}
        yield {**beside, **pixels, **masks, **high}
        if "image_sizes" in beside:
            yield {**{name: value for name, value in beside.items() if name != "image_sizes"}, **pixels}


def _layouts(model: PreTrainedModel) -> Iterator[Batch]:
    """Pixels as processors lay them out: whole pictures, tiles, patches side by side."""
    vision = getattr(model.config, "vision_config", model.config)
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)
    count, patch = GRID * GRID, 3 * PATCH * PATCH
    places = torch.cartesian_prod(torch.arange(1, GRID + 1), torch.arange(1, GRID + 1)).float()
    yield {"flattened_patches": torch.cat([places, torch.rand(count, patch)], -1)[None]}
    yield {"image_patches": torch.rand(1, count, patch)}
    for shape in (
        (1, 3, IMAGE, IMAGE),
        (1, 1, 3, IMAGE, IMAGE),
        (1, 2, 3, IMAGE, IMAGE),
        (1, 3, 3, IMAGE, IMAGE),
        (1, 1, 1, 3, IMAGE, IMAGE),
        (count, patch * frames),
        (count, patch),
        (count, 3, PATCH, PATCH),
        (count, frames, 3, PATCH, PATCH),
        (1, count, patch),
        (1, 3, PATCH, count * PATCH),
        (1, 3, 2 * IMAGE, 2 * IMAGE),
    ):
        yield {"pixel_values": torch.rand(shape)}


def _mask(pixels: Batch) -> torch.Tensor:
    """Ones for each pixel, or for each patch."""
    shape = next(iter(pixels.values())).shape
    if len(shape) == 3:
        return torch.ones(shape[:2], dtype=torch.long)
    return torch.ones((*shape[:-3], *shape[-2:]), dtype=torch.bool)


def _batch(model: PreTrainedModel, media: Batch, count: int) -> Batch:
    """Text with `count` picture tokens in it, and the media."""
    taken = inspect.signature(model.forward).parameters
    names = ("image_token_id", "image_token_index", "image_patch_id", "video_token_index")
    token = next((value for name in names if (value := getattr(model.config, name, None)) is not None), None)
    if token is None and "image_embeds_position_mask" in taken:
        token = TEXT[0]
    picture = [token] * count if media and token is not None else []
    ids = torch.tensor([[*TEXT[:2], *picture, *TEXT[2:]]])
    is_picture = torch.tensor([[False] * 2 + [True] * len(picture) + [False] * (len(TEXT) - 2)])
    own = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.where(is_picture, 0, 1)
        if model.config.model_type == "paligemma"
        else is_picture.long(),
        "mm_token_type_ids": is_picture.long(),
        "image_embeds_position_mask": is_picture.long(),
        "image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long),
        "cross_attention_mask": torch.tensor([1, 0, 0, 0]).expand(*ids.shape, 1, 4),
        "bbox": torch.zeros(*ids.shape, 4, dtype=torch.long),
    }
    batch = {name: value for name, value in own.items() if name in taken}
    if "input_ids" not in taken:
        batch.pop("attention_mask", None)
    labels = torch.tensor([TEXT]) if model.config.is_encoder_decoder else ids.masked_fill(is_picture, -100)
    return {**batch, **media, "labels": labels}
