"""Boxes and points of a row: our own `boxes`, and ms-swift's `objects`.

    {"boxes": [[12, 40, 80, 96], {"values": [7, 9], "picture": 1}], "box_unit": "pixels",
     "conversations": [… "<image><image>Where is the digit?" … "At <box>, or at <box>." …]}

    {"objects": {"ref": ["the digit"], "bbox": [[12, 40, 80, 96]], "bbox_type": "real", "image_id": [0]},
     "messages": [… "<image>Where is <ref-object>?" … "At <bbox>." …]}

A box is x1, y1, x2, y2, a point x, y; `box_unit` is pixels (the default), fraction or thousandths. A box of another
picture than the first may also be written `{"box": [7, 9], "image": 1}`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from mmpeft.config.names import did_you_mean
from mmpeft.data.rows import UnusableError, kind_of, text_of
from mmpeft.data.types import BOX_PLACEHOLDER, Box, BoxUnit, Turn

KEYS = ("boxes", "box_unit")
REF, BBOX = "<ref-object>", "<bbox>"
_UNITS: Sequence[BoxUnit] = get_args(BoxUnit)
_TYPES: Mapping[str, BoxUnit] = {"real": "pixels", "norm1": "fraction"}


def boxes_of(row: Mapping[str, Any]) -> tuple[Box, ...]:
    """The boxes under a row's `boxes`.

    Raises:
        UnusableError: they are of another shape.
    """
    boxes, unit = row.get("boxes"), row.get("box_unit")
    if boxes is None:
        return ()
    if unit is not None and unit not in _UNITS:
        raise UnusableError(f"`box_unit` is {str(unit)[:40]!r}{did_you_mean(str(unit), _UNITS)}")
    if not isinstance(boxes, list):
        raise UnusableError(f"`boxes` is {kind_of(boxes)}; expected a list of boxes")
    return tuple(_box(item, number, unit or "pixels") for number, item in enumerate(boxes))


def _box(item: Any, number: int, unit: BoxUnit, picture: Any = 0) -> Box:
    values = item
    if isinstance(item, dict):
        values, picture = item.get("values", item.get("box")), item.get("picture", item.get("image", picture))
    if not isinstance(values, list) or len(values) not in (2, 4):
        raise UnusableError(f"box {number} is no list of 2 or 4 numbers; write [x1, y1, x2, y2], or [x, y] of a point")
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UnusableError(f"box {number} holds {kind_of(value)}; expected numbers")
    if not isinstance(picture, int) or isinstance(picture, bool) or picture < 0:
        raise UnusableError(f"box {number} is in picture {str(picture)[:20]!r}; expected a number from 0")
    try:
        return Box(values=tuple(float(value) for value in values), picture=picture, unit=unit)
    except OverflowError:
        raise UnusableError(f"box {number} holds a number beyond all bounds; correct it") from None


def with_objects(turns: tuple[Turn, ...], objects: Any) -> tuple[tuple[Turn, ...], tuple[Box, ...]]:
    """ms-swift's turns with every `<ref-object>` as its words and every `<bbox>` as `<box>`, and the boxes.

    Raises:
        UnusableError: `objects` is of another shape, or the messages hold another number of `<ref-object>`.
    """
    if objects is None:
        return turns, ()
    if not isinstance(objects, dict):
        raise UnusableError(f"`objects` is {kind_of(objects)}; expected an object with `ref` and `bbox`")
    refs, boxes = _list(objects, "ref"), _list(objects, "bbox")
    pictures = _list(objects, "image_id") or [0] * len(boxes)
    if len(pictures) != len(boxes):
        raise UnusableError(f"`image_id` has {len(pictures)} entries for {len(boxes)} boxes; write one for each")
    kind = objects.get("bbox_type") or "real"
    if not isinstance(kind, str) or kind not in _TYPES:
        raise UnusableError(f"`bbox_type` is {str(kind)[:40]!r}{did_you_mean(str(kind), _TYPES)}")
    count = sum(turn.text.count(REF) for turn in turns)
    if count != len(refs) and count:
        raise UnusableError(
            f"{len(refs)} entries in `ref` but {count} {REF} placeholders; write one for each, in order"
        )
    words = iter(text_of(ref, "an entry of `ref`") for ref in refs)
    marked = tuple(replace(turn, text=_filled(turn.text, words)) for turn in turns)
    placed = zip(boxes, pictures, strict=True)
    found = tuple(_box(box, number, _TYPES[kind], picture) for number, (box, picture) in enumerate(placed))
    return marked, found


def _list(objects: Mapping[str, Any], key: str) -> list[Any]:
    value = objects.get(key)
    if value is not None and not isinstance(value, list):
        raise UnusableError(f"`{key}` of `objects` is {kind_of(value)}; expected a list")
    return value or []


def _filled(text: str, words: Iterator[str]) -> str:
    first, *rest = text.replace(BBOX, BOX_PLACEHOLDER).split(REF)
    return first + "".join(next(words) + part for part in rest)
