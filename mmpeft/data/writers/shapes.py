"""A sample as a row of each layout; what a layout cannot hold is an error, never left out."""

from collections.abc import Callable, Mapping
from typing import Any

from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.layouts.llava import SPEAKERS
from mmpeft.data.layouts.objects import BBOX, REF
from mmpeft.data.rows import MEDIA_KEYS, UnusableError
from mmpeft.data.types import BOX_PLACEHOLDER, PLACEHOLDERS, WORDS, Box, Sample

Shape = Callable[[Sample], dict[str, Any]]
"""Makes a row of a sample; raises `UnusableError` where the layout cannot hold it."""


def llava_row(sample: Sample) -> dict[str, Any]:
    """A row of LLaVA's layout, which holds everything."""
    media: dict[str, Any] = {}
    for modality, paths in sample.media.items():
        one, many = MEDIA_KEYS[modality]
        if paths:
            media |= {one: paths[0]} if len(paths) == 1 else {many: list(paths)}
    turns = [{"from": SPEAKERS[turn.role], "value": turn.text} for turn in sample.turns]
    return {**_named(sample), **media, **_boxes(sample), "conversations": turns}


def messages_row(sample: Sample) -> dict[str, Any]:
    """A row of OpenAI's chat messages, its media as parts of the contents."""
    left = {modality: iter(paths) for modality, paths in sample.media.items()}
    for modality, paths in sample.media.items():
        for path in paths:
            scheme, found, _ = path.partition("://")
            if found and scheme.isalnum() and scheme != "file":
                raise UnusableError(f"{WORDS[modality]} {path[:60]!r} is a URL, and URLs are off: download it")
    messages = [{"role": turn.role, "content": _content(turn.text, left)} for turn in sample.turns]
    return {**_named(sample), **_boxes(sample), "messages": messages}


def _content(text: str, left: Mapping[Modality, Any]) -> str | list[dict[str, Any]]:
    """A text, or its parts where it holds placeholders."""
    parts: list[dict[str, Any]] = []
    while True:
        places = {text.find(mark): modality for modality, mark in PLACEHOLDERS.items() if mark in text}
        if not places:
            break
        place = min(places)
        modality = places[place]
        parts += [{"type": "text", "text": text[:place]}] if place else []
        kind = f"{modality}_url"
        parts.append({"type": kind, kind: {"url": next(left[modality])}})
        text = text[place + len(PLACEHOLDERS[modality]) :]
    if not parts:
        return text
    return [*parts, {"type": "text", "text": text}] if text else parts


def swift_row(sample: Sample) -> dict[str, Any]:
    """A row of ms-swift's standard layout; boxes become its `objects`."""
    row = _tagged_row(sample)
    if not sample.boxes:
        return row
    unit = _unit(sample.boxes)
    if unit == "thousandths":
        raise UnusableError("its boxes count thousandths, which ms-swift's `objects` do not; give them in pixels")
    for number, turn in enumerate(sample.turns):
        if BBOX in turn.text or REF in turn.text:
            raise UnusableError(f"turn {number} holds {BBOX} or {REF} as text, which ms-swift would replace; reword it")
    for message in row["messages"]:
        message["content"] = message["content"].replace(BOX_PLACEHOLDER, BBOX)
    objects = {
        "ref": [],
        "bbox": [list(box.values) for box in sample.boxes],
        "bbox_type": "real" if unit == "pixels" else "norm1",
        "image_id": [box.picture for box in sample.boxes],
    }
    return {**row, "objects": objects}


def llamafactory_row(sample: Sample) -> dict[str, Any]:
    """A row of LLaMA-Factory's multimodal demo files; `dataset_info.json` has to name it (see `INFO`)."""
    if sample.boxes:
        raise UnusableError("it holds boxes, for which LLaMA-Factory has no place; write them into the text first")
    return _tagged_row(sample)


def _tagged_row(sample: Sample) -> dict[str, Any]:
    media = {f"{modality}s": list(paths) for modality, paths in sample.media.items() if paths}
    messages = [{"role": turn.role, "content": turn.text} for turn in sample.turns]
    return {**_named(sample), "messages": messages, **media}


def llamafactory_entry(file_name: str, modalities: set[Modality]) -> dict[str, Any]:
    """The entry of `dataset_info.json` for a file of `llamafactory_row`s."""
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", **{f"{name}s": f"{name}s" for name in MODALITIES if name in modalities}},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "system_tag": "system",
        },
    }


def triple_row(sample: Sample) -> dict[str, Any]:
    """A row of one question and one answer."""
    if [turn.role for turn in sample.turns] != ["user", "assistant"]:
        system = sample.turns[0].role == "system"
        found = "a system turn" if system else f"{len(sample.turns)} turns"
        raise UnusableError(f"it has {found}; a row of question and answer holds one of each: split it, or use llava")
    if sample.boxes:
        raise UnusableError("it holds boxes, for which a row of question and answer has no place; use llava")
    question, answer = (turn.text for turn in sample.turns)
    media = {f"{modality}s": list(paths) for modality, paths in sample.media.items() if paths}
    return {**_named(sample), **media, "question": question, "answer": answer}


def _named(sample: Sample) -> dict[str, Any]:
    return {"id": sample.id, **({"kind": sample.kind} if sample.kind else {})}


def _boxes(sample: Sample) -> dict[str, Any]:
    if not sample.boxes:
        return {}
    boxes = [
        {"values": list(box.values), "picture": box.picture} if box.picture else list(box.values)
        for box in sample.boxes
    ]
    return {"boxes": boxes, "box_unit": _unit(sample.boxes)}


def _unit(boxes: tuple[Box, ...]) -> str:
    units = {box.unit for box in boxes}
    if len(units) > 1:
        raise UnusableError(f"its boxes count {' and '.join(sorted(units))}; a row has one unit: give all in pixels")
    return units.pop()
