"""ms-swift's `objects`: what `<ref-object>` and `<bbox>` in the messages stand for.

{"messages": [{"role": "user", "content": "<image>Where is <ref-object>?"},
              {"role": "assistant", "content": "At <bbox>."}],
 "objects": {"ref": ["the digit"], "bbox": [[1, 2, 30, 40]]}}
"""

import math
from dataclasses import replace
from typing import Any

from mmpeft.data.rows import UnusableError, kind_of, text_of
from mmpeft.data.types import Turn

REF, BBOX = "<ref-object>", "<bbox>"


def with_objects(turns: tuple[Turn, ...], objects: Any) -> tuple[Turn, ...]:
    """The turns with every `<ref-object>` as the words it stands for.

    Raises:
        UnusableError: `objects` is of another shape, or the messages hold another number of placeholders.
    """
    if objects is None:
        return turns
    if not isinstance(objects, dict):
        raise UnusableError(f"`objects` is {kind_of(objects)}; expected an object with `ref` and `bbox`")
    refs = objects.get("ref") or []
    if not isinstance(refs, list):
        raise UnusableError(f"`ref` of `objects` is {kind_of(refs)}; expected a list of strings")
    check_boxes(objects.get("bbox") or [])
    if any(BBOX in turn.text for turn in turns):
        raise UnusableError(f"the messages hold {BBOX}, which is not replaced yet; write the box itself in its place")
    count = sum(turn.text.count(REF) for turn in turns)
    # More refs than placeholders is how ms-swift's own examples name what the boxes hold.
    if count > len(refs):
        raise UnusableError(
            f"{len(refs)} entries in `ref` but {count} {REF} placeholders; write one for each, in order"
        )
    words = iter(text_of(ref, "an entry of `ref`") for ref in refs)
    return tuple(replace(turn, text=_filled(turn.text, words)) for turn in turns)


def _filled(text: str, words: Any) -> str:
    first, *rest = text.split(REF)
    return first + "".join(next(words) + part for part in rest)


def check_boxes(boxes: Any) -> None:
    """`bbox` is a list of lists of 2 or 4 finite numbers.

    Raises:
        UnusableError: it is not.
    """
    if not isinstance(boxes, list):
        raise UnusableError(f"`bbox` is {kind_of(boxes)}; expected a list of boxes")
    for number, box in enumerate(boxes):
        if not isinstance(box, list) or len(box) not in (2, 4):
            raise UnusableError(f"box {number} is no list of 2 or 4 numbers; write [x1, y1, x2, y2], or [x, y]")
        for edge in box:
            if not isinstance(edge, int | float) or isinstance(edge, bool) or not _finite(edge):
                raise UnusableError(f"box {number} holds {str(edge)[:20]}; expected finite numbers")


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    # An integer beyond the largest float.
    except OverflowError:
        return False
