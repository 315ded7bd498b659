"""How many pixels of a picture a processor keeps: set on the processor, so that it is saved with the adapter.

Image processors say it in one of three ways, and the model takes what comes:

    size {"shortest_edge", "longest_edge"}, in pixels    Qwen2-VL and after: the area, between a least and a most
    max_patches, of tiles of `size`                      InternVL and others that cut a picture into tiles
    size {"longest_edge"}, in pixels of a side           Idefics3, SmolVLM: the side before it is cut into tiles
"""

import math
from typing import Any

from mmpeft.core.errors import ModelError


def limit_pixels(processor: Any, max_pixels: int) -> None:
    """Let a processor keep at most `max_pixels` (width x height) of a picture, tiles together.

    Raises:
        ModelError: its pictures have a fixed size, or fewer pixels than one tile are asked for.
    """
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        raise ModelError(f"max_pixels: {type(processor).__name__} takes no pictures; leave it out")
    size = _sizes(image_processor)
    if "shortest_edge" in size and "longest_edge" in size and hasattr(image_processor, "merge_size"):
        _limit_area(image_processor, size, max_pixels)
    elif getattr(image_processor, "max_patches", None) and "height" in size:
        tile = size["height"] * size["width"]
        _at_least(max_pixels, tile, "tile", image_processor)
        image_processor.max_patches = min(image_processor.max_patches, max_pixels // tile)
        image_processor.min_patches = min(image_processor.min_patches, image_processor.max_patches)
    elif "longest_edge" in size and getattr(image_processor, "max_image_size", None):
        tile = _sizes(image_processor, "max_image_size")["longest_edge"]
        _at_least(max_pixels, tile * tile, "tile", image_processor)
        side = math.isqrt(max_pixels) // tile * tile
        image_processor.size = {"longest_edge": min(size["longest_edge"], side)}
    else:
        raise ModelError(
            f"max_pixels: {type(image_processor).__name__} gives every picture the size that the model was built for "
            f"({size or 'by its grid'}); leave it out"
        )


def _sizes(image_processor: Any, name: str = "size") -> dict[str, int]:
    """A size of an image processor without what is not set."""
    value = getattr(image_processor, name, None)
    return {key: side for key, side in dict(value or {}).items() if side is not None}


def _limit_area(image_processor: Any, size: dict[str, int], max_pixels: int) -> None:
    block = (image_processor.patch_size * image_processor.merge_size) ** 2
    _at_least(max_pixels, block, "picture token", image_processor)
    image_processor.size = {
        "shortest_edge": min(size["shortest_edge"], max_pixels),
        "longest_edge": min(size["longest_edge"], max_pixels),
    }


def _at_least(max_pixels: int, least: int, what: str, image_processor: Any) -> None:
    if max_pixels < least:
        raise ModelError(
            f"max_pixels: {max_pixels} is below one {what} of {type(image_processor).__name__} ({least} pixels)"
        )
