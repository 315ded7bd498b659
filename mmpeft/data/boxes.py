"""Boxes and points in a picture, written into text and read back in each family's convention.

convention         a box over the left half of an upright 640 x 480 picture
fraction           [0.0, 0.0, 0.5, 1.0]
thousandths        [0, 0, 500, 1000]
resized_pixels     [0, 0, 322, 476]                        where the processor resizes to 644 x 476
location_tokens    <loc0000><loc0000><loc1023><loc0512>    y before x
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from mmpeft.core.errors import DataError
from mmpeft.families.spec import BoxConvention

Unit = Literal["pixel", "relative", "thousandths"]
"""What a box's values count: pixels of the upright picture, shares of it, or thousandths of it."""

LOCATIONS = 1024
"""Location tokens of PaliGemma's tokenizer a side, `<loc0000>` to `<loc1023>`; a token stands for its number / 1024."""

_TOLERANCE = 1e-6
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BRACKETS = re.compile(rf"[\[(]{_NUMBER},{_NUMBER}(?:,{_NUMBER},{_NUMBER})?[\])]")
_LOCATIONS = re.compile(r"<loc(\d{4})><loc(\d{4})>(?:<loc(\d{4})><loc(\d{4})>)?")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box (x1, y1, x2, y2) or a point (x, y), from the top left corner, with what it holds.

    Attributes:
        label: what is there; "" if not said.
        values: two or four numbers, in `unit`.
        unit: what the numbers count.
    """

    values: tuple[float, ...]
    label: str = ""
    unit: Unit = "pixel"


def relative_values(box: Box, *, size: tuple[int, int]) -> tuple[float, ...]:
    """A box's values from 0 to 1, of a picture of `size` (width, height), upright.

    Raises:
        DataError: not two or four numbers, NaN or infinite, outside the picture, or a corner before the other.
    """
    what = f"box {box.label!r} {list(box.values)}"
    if len(box.values) not in (2, 4):
        raise DataError(f"{what} has {len(box.values)} values; expected x1, y1, x2, y2, or x, y of a point")
    if not all(math.isfinite(value) for value in box.values):
        raise DataError(f"{what} has a value that is NaN or infinite; correct it, or remove the box")
    whole = {"pixel": size, "relative": (1, 1), "thousandths": (1000, 1000)}[box.unit]
    values = tuple(value / whole[place % 2] for place, value in enumerate(box.values))
    if not all(-_TOLERANCE <= value <= 1 + _TOLERANCE for value in values):
        raise DataError(
            f"{what} lies outside the picture of {size[0]} x {size[1]} (unit: {box.unit}); correct it, or its unit"
        )
    if len(values) == 4 and (values[2] < values[0] or values[3] < values[1]):
        raise DataError(f"{what} is reversed; expected x1, y1, x2, y2 with x1 <= x2 and y1 <= y2")
    return tuple(min(1.0, max(0.0, value)) for value in values)


def write_box(
    box: Box, *, size: tuple[int, int], resized: tuple[int, int] | None = None, convention: BoxConvention
) -> str:
    """A box as text, without its label.

    Args:
        box: the box.
        size: (width, height) of the picture, upright, before the processor.
        resized: (width, height) after the processor; needed by "resized_pixels" alone.
        convention: the family's.

    Raises:
        DataError: as `relative_values`; or `resized` is missing.
    """
    values = relative_values(box, size=size)
    if convention == "fraction":
        return f"[{', '.join(str(round(value, 3)) for value in values)}]"
    if convention == "location_tokens":
        swapped = [values[place ^ 1] for place in range(len(values))]
        return "".join(f"<loc{min(LOCATIONS - 1, round(value * LOCATIONS)):04d}>" for value in swapped)
    whole = _whole(convention, resized)
    return f"[{', '.join(str(round(value * whole[place % 2])) for place, value in enumerate(values))}]"


def read_boxes(text: str, *, convention: BoxConvention, resized: tuple[int, int] | None = None) -> tuple[Box, ...]:
    """The boxes and points in a text, in order, unit "relative"; what is outside the picture or reversed is left out.

    Raises:
        DataError: the convention is "resized_pixels" and `resized` is missing.
    """
    if convention == "location_tokens":
        found = [
            tuple((int(one) + 0.0) / LOCATIONS for one in match.groups() if one is not None)
            for match in _LOCATIONS.finditer(text)
        ]
        values = [tuple(numbers[place ^ 1] for place in range(len(numbers))) for numbers in found]
    else:
        whole = _whole(convention, resized)
        values = [
            tuple(float(one) / whole[place % 2] for place, one in enumerate(match.groups()) if one is not None)
            for match in _BRACKETS.finditer(text)
        ]
    boxes = (Box(values=numbers, unit="relative") for numbers in values)
    return tuple(box for box in boxes if _usable(box))


def _usable(box: Box) -> bool:
    try:
        relative_values(box, size=(1, 1))
    except DataError:
        return False
    return True


def _whole(convention: BoxConvention, resized: tuple[int, int] | None) -> tuple[int, int]:
    if convention == "resized_pixels":
        if resized is None:
            raise DataError("boxes in resized_pixels need the size to which the processor resizes the picture")
        return resized
    return (1000, 1000) if convention == "thousandths" else (1, 1)
