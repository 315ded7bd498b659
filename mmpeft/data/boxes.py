"""Boxes and points in pictures: checked against the picture, and moved with it.

a box on 640 x 480        [300, 40, 620, 200]
cropped to (100, 20) ...  [200, 20, 520, 180]     of the 540 x 400 that are left
mirrored                  [20, 20, 340, 180]
"""

import math
import re

from mmpeft.core.errors import DataError
from mmpeft.data.types import BOX_PLACEHOLDER, Box, Role, Sample

NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
BRACKETS = re.compile(rf"[\[(]{NUMBER},{NUMBER}(?:,{NUMBER},{NUMBER})?[\])]")
"""A box or a point that stands in a text as numbers."""

PAIRS = re.compile(rf"\(({NUMBER},{NUMBER})\),\(({NUMBER},{NUMBER})\)")
"""A box as two corners, which Qwen2-VL writes."""

LOCATIONS = re.compile(r"<loc(\d{4})><loc(\d{4})>(?:<loc(\d{4})><loc(\d{4})>)?")
"""The same as PaliGemma's location tokens."""

_OTHERS = re.compile(r"""<loc_\d+>|<patch_index_\d+>|\bx1?=["']?\d|\bx1?["']?:\s*["']?\d""")
"""How other models write places: Florence-2, Kosmos-2, Molmo's `<point x="61.5" y="40.4">`, JSON of x and y."""

_TOLERANCE = 1e-6


def holds_places(text: str) -> bool:
    """Whether a text holds what looks like a box or a point written as numbers, which no crop or flip could move."""
    return any(pattern.search(text) for pattern in (BRACKETS, LOCATIONS, _OTHERS))


def boxes_said(sample: Sample, role: Role) -> str:
    """The boxes in the turns of `role`, as one text: what tells samples apart whose texts are alike but for them."""
    boxes, said = list(sample.boxes), []
    for turn in sample.turns if boxes else ():
        count = turn.text.count(BOX_PLACEHOLDER)
        said += [f"{box.values} {box.picture} {box.unit}" for box in boxes[:count] if turn.role == role]
        del boxes[:count]
    return " ".join(said)


def check_values(box: Box) -> None:
    """Make sure of what can be told without the picture.

    Raises:
        DataError: not two or four numbers, NaN or infinite, or reversed.
    """
    what = f"box {list(box.values)}"
    if len(box.values) not in (2, 4):
        raise DataError(f"{what} has {len(box.values)} values; expected x1, y1, x2, y2, or x, y of a point")
    if not all(math.isfinite(value) for value in box.values):
        raise DataError(f"{what} has a value that is NaN or infinite; correct it, or remove the box")
    if len(box.values) == 4 and (box.values[2] < box.values[0] or box.values[3] < box.values[1]):
        raise DataError(
            f"{what} is reversed; expected x1, y1, x2, y2 with x1 <= x2 and y1 <= y2 (not x, y, width, height)"
        )


def relative_values(box: Box, *, size: tuple[int, int]) -> tuple[float, ...]:
    """A box's values from 0 to 1, of a picture of `size` (width, height), upright.

    Raises:
        DataError: as `check_values`; or outside the picture.
    """
    check_values(box)
    whole = {"pixels": size, "fraction": (1, 1), "thousandths": (1000, 1000)}[box.unit]
    values = tuple(value / whole[place % 2] for place, value in enumerate(box.values))
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        raise DataError(
            f"box {list(box.values)} lies outside picture {box.picture}, which is {size[0]} x {size[1]} "
            f"(unit: {box.unit}); correct it, or say by `box_unit` what it counts"
        )
    return tuple(min(1.0, max(0.0, value)) for value in values)


def pixel_values(box: Box, *, size: tuple[int, int]) -> tuple[float, ...]:
    """A box's values in pixels of its picture of `size` (width, height), upright.

    Raises:
        DataError: as `relative_values`.
    """
    relative = relative_values(box, size=size)
    if box.unit == "pixels":
        return tuple(min(float(size[place % 2]), max(0.0, value)) for place, value in enumerate(box.values))
    return tuple(value * size[place % 2] for place, value in enumerate(relative))


def cropped(box: Box, *, size: tuple[int, int], window: tuple[int, int, int, int]) -> Box:
    """A box on what a crop leaves of its picture, in pixels.

    Args:
        box: the box, on the whole picture.
        size: (width, height) of the whole picture.
        window: left, top, right, bottom of the crop; what of the box lies outside is cut off.

    Raises:
        DataError: as `relative_values`.
    """
    left, top, right, bottom = window
    bounds, corner = (right - left, bottom - top), (left, top)
    moved = (value - corner[place % 2] for place, value in enumerate(pixel_values(box, size=size)))
    inside = tuple(min(float(bounds[place % 2]), max(0.0, value)) for place, value in enumerate(moved))
    return Box(values=inside, picture=box.picture, unit="pixels")


def mirrored(box: Box, *, size: tuple[int, int]) -> Box:
    """A box on its picture mirrored left to right, in pixels.

    Raises:
        DataError: as `relative_values`.
    """
    values = pixel_values(box, size=size)
    width = float(size[0])
    if len(values) == 2:
        return Box(values=(width - values[0], values[1]), picture=box.picture, unit="pixels")
    left, top, right, bottom = values
    return Box(values=(width - right, top, width - left, bottom), picture=box.picture, unit="pixels")
