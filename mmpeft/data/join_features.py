"""Kept features of samples in a batch, and how samples without them stand beside samples with them.

A sample of a data set with a feature cache has a `features_key` (and `features_rest`, a `KeptExpansion`). Where the
cache holds it, `features` take the place of its pixels and sounds, whose shapes `features_shapes` tells:

    sample            features_key  features             features_shapes               pixel_values   image_grid_thw
    kept              "ab12"        {name: tensor}       {"pixel_values": (s, dtype)}       -               yes
    not yet           "cd34"        -                    -                                yes               yes

    batch["features"]         one of each sample with media, in order: {"key", "tensors", "media", "rest"}
    batch["features_shapes"]  what the batch would hold of pixels and sounds: {"pixel_values": (shape, dtype)}
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

KEYS = frozenset({"features_key", "features", "features_shapes", "features_rest"})
"""Keys of a sample that are about its kept features."""

HEAVY = frozenset({"pixel_values", "pixel_values_videos", "input_features", "pixel_attention_mask"})
"""Keys of a sample whose tensors towers alone read."""

Shape = tuple[tuple[int, ...], torch.dtype]


def has_features(samples: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any sample comes from a data set with a feature cache."""
    return any("features_key" in sample for sample in samples)


def has_tensor(sample: Mapping[str, Any], key: str) -> bool:
    """Whether a sample has this tensor, or kept features in its place."""
    return key in sample or key in sample.get("features_shapes", ())


def join_features(samples: Sequence[Mapping[str, Any]], media: frozenset[str]) -> dict[str, Any]:
    """`features` and `features_shapes` of a batch, as drawn above.

    Args:
        samples: what the batch holds, some of them of a data set with a feature cache.
        media: the keys under which media tensors stand in them.

    Returns:
        `features`: of each sample with media `key` ("" if it is not to be kept), `tensors` (None if they have to be
        computed), `media`, what they are computed from ({} if they are there), and `rest`. {} if no sample has media.
    """
    carriers, shapes = [], []
    for sample in samples:
        own = {key: torch.as_tensor(sample[key]) for key in media & set(sample)}
        kept = sample.get("features")
        if not own and kept is None:
            continue
        carriers.append(
            {
                "key": sample.get("features_key", ""),
                "tensors": kept,
                "media": {} if kept is not None else own,
                "rest": sample.get("features_rest"),
            }
        )
        heavy = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in own.items() if key in HEAVY}
        shapes.append(heavy | dict(sample.get("features_shapes", {})))
    if not carriers:
        return {}
    joined = {key: _joined([each[key] for each in shapes if key in each]) for each in shapes for key in each}
    return {"features": carriers, "features_shapes": joined}


def _joined(shapes: Sequence[Shape]) -> Shape:
    """The shape of tensors one behind the other, the smaller filled up."""
    sizes = [shape for shape, _ in shapes]
    return (sum(size[0] for size in sizes), *map(max, zip(*(size[1:] for size in sizes), strict=True))), shapes[0][1]
