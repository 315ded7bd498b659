"""Boxes and points written into text and read back, in each family's convention.

convention         a box over the left half of an upright 640 x 480 picture
fraction           [0.0, 0.0, 0.5, 1.0]
thousandths        [0, 0, 500, 1000]
resized_pixels     [0, 0, 322, 476]                        where the processor resizes to 644 x 476
location_tokens    <loc0000><loc0000><loc1023><loc0512>    y before x

Two families put marks around the numbers (`BoxNotation`):

Qwen2-VL           <|box_start|>(0,0),(500,1000)<|box_end|>
InternVL           <box>[[0, 0, 500, 1000]]</box>
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmpeft.core.errors import DataError
from mmpeft.data.boxes import BRACKETS, LOCATIONS, PAIRS, relative_values
from mmpeft.data.load_media import MediaLimits, placed
from mmpeft.data.media import upright_sizes
from mmpeft.data.types import BOX_PLACEHOLDER, Box, Sample, Turn
from mmpeft.families.registry import family_of_processor
from mmpeft.families.spec import BoxConvention, BoxNotation

LOCATION_COUNT = 1024
"""Location tokens of PaliGemma's tokenizer a side, `<loc0000>` to `<loc1023>`; a token stands for its number / 1024."""


def box_convention(processor: Any) -> BoxConvention:
    """How the family of a processor writes places; where no family names it, as LLaVA does."""
    spec = family_of_processor(processor)
    return "fraction" if spec is None else spec.boxes


def box_notation(processor: Any) -> BoxNotation:
    """How the family of a processor writes the numbers of a place."""
    spec = family_of_processor(processor)
    return BoxNotation() if spec is None else spec.box_notation


def without_marks(processor: Any, text: str) -> str:
    """A text without the control tokens around its places, as it comes back from a model's answer."""
    for mark in box_notation(processor).marks:
        text = text.replace(mark, "")
    return text


def resized_size(processor: Any, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) to which a processor of the Qwen line resizes a picture of `size`, by the limits it has now.

    Raises:
        DataError: the picture is too thin for the processor.
    """
    worker = processor.image_processor
    width, height = size
    try:
        high, wide = smart_resize(
            height,
            width,
            factor=worker.patch_size * worker.merge_size,
            min_pixels=worker.size["shortest_edge"],
            max_pixels=worker.size["longest_edge"],
        )
    except ValueError as error:
        raise DataError(f"a picture of {width} x {height}: {error}") from error
    return wide, high


def with_boxes(
    processor: Any, turns: Sequence[Turn], boxes: Sequence[Box], sizes: Sequence[tuple[int, int]]
) -> tuple[Turn, ...]:
    """The turns with every `<box>` as the text that the processor's family writes for it.

    Args:
        processor: says the family, and how pictures are resized.
        turns: hold as many `<box>` as there are boxes, or fewer where they are a conversation's beginning.
        boxes: in the order of their placeholders. Without any, `<box>` is text like any other.
        sizes: (width, height) of each of the sample's pictures, upright, before the processor.

    Raises:
        DataError: a box that is none, or lies outside its picture (see `relative_values`).
    """
    if not boxes:
        return tuple(turns)
    convention = box_convention(processor)
    written = iter([_written(processor, box, sizes, convention) for box in boxes])
    return tuple(replace(turn, text=_filled(turn.text, written)) for turn in turns)


def spelt_out(processor: Any, sample: Sample, *, root: Path, limits: MediaLimits) -> Sample:
    """The sample with its boxes written into its text, by the headers of its pictures alone.

    Raises:
        DataError: as `with_boxes`; or a picture cannot be read.
    """
    if not sample.boxes:
        return sample
    sizes = [upright_sizes(name, root=root, max_image_pixels=limits.max_image_pixels)[1] for name in sample.images]
    sample = placed(sample, root=root, limits=limits)
    return replace(sample, turns=with_boxes(processor, sample.turns, sample.boxes, sizes), boxes=())


def _written(processor: Any, box: Box, sizes: Sequence[tuple[int, int]], convention: BoxConvention) -> str:
    size = sizes[box.picture]
    resized = resized_size(processor, size) if convention == "resized_pixels" else None
    return write_box(box, size=size, resized=resized, convention=convention, notation=box_notation(processor))


def _filled(text: str, written: Iterator[str]) -> str:
    first, *rest = text.split(BOX_PLACEHOLDER)
    return first + "".join(next(written) + piece for piece in rest)


def write_box(
    box: Box,
    *,
    size: tuple[int, int],
    resized: tuple[int, int] | None = None,
    convention: BoxConvention,
    notation: BoxNotation | None = None,
) -> str:
    """A box as text.

    Args:
        box: the box.
        size: (width, height) of the picture, upright, before the processor.
        resized: (width, height) after the processor; needed by "resized_pixels" alone.
        convention: what the numbers count, by the family.
        notation: how they are written, by the family; location tokens have their own.

    Raises:
        DataError: as `relative_values`; or `resized` is missing.
    """
    notation = notation or BoxNotation()
    values = relative_values(box, size=size)
    if convention == "fraction":
        return _noted([round(value, 3) for value in values], notation)
    if convention == "location_tokens":
        swapped = [values[place ^ 1] for place in range(len(values))]
        return "".join(f"<loc{min(LOCATION_COUNT - 1, round(value * LOCATION_COUNT)):04d}>" for value in swapped)
    whole = _whole(convention, resized)
    return _noted([round(value * whole[place % 2]) for place, value in enumerate(values)], notation)


def _noted(numbers: Sequence[float], notation: BoxNotation) -> str:
    if len(numbers) == 2:
        return notation.point.format(x=numbers[0], y=numbers[1])
    return notation.box.format(x1=numbers[0], y1=numbers[1], x2=numbers[2], y2=numbers[3])


def read_boxes(text: str, *, convention: BoxConvention, resized: tuple[int, int] | None = None) -> tuple[Box, ...]:
    """The boxes and points in a text, in order, unit "fraction", whatever the notation.

    What is outside the picture or reversed is left out.

    Raises:
        DataError: the convention is "resized_pixels" and `resized` is missing.
    """
    if convention == "location_tokens":
        found = [
            tuple(int(one) / LOCATION_COUNT for one in match.groups() if one is not None)
            for match in LOCATIONS.finditer(text)
        ]
        values = [tuple(numbers[place ^ 1] for place in range(len(numbers))) for numbers in found]
    else:
        whole = _whole(convention, resized)
        values = [
            tuple(float(one) / whole[place % 2] for place, one in enumerate(match.groups()) if one is not None)
            for match in BRACKETS.finditer(PAIRS.sub(r"[\1, \4]", text))
        ]
    boxes = (Box(values=numbers, unit="fraction") for numbers in values)
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
