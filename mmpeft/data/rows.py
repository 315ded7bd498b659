"""From what a layout found in a row to a checked sample, by the same rules whatever the layout.

decoded row  -- layouts/<name>.py -->  Draft  -- sample_of -->  Sample
                                       (order of turns, placeholders of each medium, texts)
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.boxes import check_values
from mmpeft.data.problems import Problem
from mmpeft.data.types import BOX_PLACEHOLDER, PLACEHOLDERS, WORDS, Box, Role, Sample, Turn

MEDIA_KEYS: Mapping[Modality, tuple[str, ...]] = {modality: (modality, f"{modality}s") for modality in MODALITIES}
"""The keys of a row that hold paths of media: one path, or a list of them."""

MEDIA_ROW_KEYS = tuple(key for keys in MEDIA_KEYS.values() for key in keys)


MAX_TURNS = 10_000
"""Turns of the longest conversation; chat templates, and models, are made for far fewer."""


class UnusableError(Exception):
    """Why a row is no sample; becomes a `Problem` or a `DataError` before it leaves `formats`."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a data file: a sample, or the problem that keeps it from being one.

    Attributes:
        sample: the checked sample; None if there is a problem.
        problem: None if there is a sample.
        ignored: the row's keys that mmpeft does not know and does not use.
    """

    sample: Sample | None = None
    problem: Problem | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What a layout found in a row; not yet checked as a whole.

    Attributes:
        turns: the messages, each checked on its own; at least one.
        media: paths, URLs or `container::member`, by modality.
        boxes: what each `<box>` in the turns stands for, in order.
        id, kind: as they stand in the row.
        speakers: what the layout calls each role, for messages.
    """

    turns: tuple[Turn, ...]
    media: Mapping[Modality, tuple[str, ...]] = field(default_factory=dict)
    boxes: tuple[Box, ...] = ()
    id: Any = None
    kind: Any = None
    speakers: Mapping[Role, str] = field(
        default_factory=lambda: {"user": "user", "assistant": "assistant", "system": "system"}
    )


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # NaN, which pandas writes for an empty cell, Infinity or -Infinity
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")


def check_count(turns: Sequence[Any]) -> None:
    """See that a conversation has no more than `MAX_TURNS` turns.

    Raises:
        UnusableError: it has.
    """
    if len(turns) > MAX_TURNS:
        raise UnusableError(f"{len(turns)} turns; expected at most {MAX_TURNS}: split the conversation")


def text_of(value: Any, what: str) -> str:
    """`value`, if it is text that can be written as UTF-8.

    Raises:
        UnusableError: it is not.
    """
    if not isinstance(value, str):
        raise UnusableError(f"{what} is {kind_of(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise UnusableError(
            f"{what} holds half of a surrogate pair ({code} at character {error.start}), which is no text; "
            "write the whole character"
        ) from None
    return value


def said(value: Any, what: str) -> str:
    """A text that is not empty.

    Raises:
        UnusableError: it is empty, or no text.
    """
    text = text_of(value, what)
    if not text.strip():
        raise UnusableError(f"{what} is empty; write it, or leave the sample out")
    return text


def media_of(row: Mapping[str, Any]) -> dict[Modality, tuple[str, ...]]:
    """The paths under `image(s)`, `video(s)` and `audio(s)` of a row.

    Raises:
        UnusableError: one is no path, or empty, or both keys of a modality are given.
    """
    return {modality: _paths(row, modality) for modality in MODALITIES}


def _paths(row: Mapping[str, Any], modality: Modality) -> tuple[str, ...]:
    found = [key for key in MEDIA_KEYS[modality] if row.get(key) is not None]
    if len(found) == 2:
        raise UnusableError(f"both `{found[0]}` and `{found[1]}` are given; keep one of them")
    return paths_of(row[found[0]], found[0], modality) if found else ()


def paths_of(value: Any, key: str, modality: Modality = "image") -> tuple[str, ...]:
    """The path, or the list of paths, under `key`; `{"path": …}` stands for its path.

    Raises:
        UnusableError: it is none, or empty.
    """
    values = [_plain(item) for item in (value if isinstance(value, list) else [value])]
    if any(not isinstance(item, str) for item in values):
        wrong = next(item for item in values if not isinstance(item, str))
        raise UnusableError(f"`{key}` holds {kind_of(wrong)}; expected a path or a list of paths")
    if any(not item.strip() for item in values):
        raise UnusableError(f"`{key}` holds an empty path; write the {WORDS[modality]}'s path, or leave `{key}` out")
    return tuple(text_of(item, f"`{key}`") for item in values)


def _plain(item: Any) -> Any:
    """`{"path": "a.png", "bytes": null}`, as `datasets` writes pictures into JSON, as its path."""
    whole = isinstance(item, dict) and set(item) <= {"path", "bytes"} and item.get("bytes") is None
    return item["path"] if whole and "path" in item else item


def with_system(row: Mapping[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns, with the row's `system` text as the first of them.

    Raises:
        UnusableError: `system` is no text, or there is a system turn too.
    """
    if row.get("system") in (None, ""):
        return turns
    if turns and turns[0].role == "system":
        raise UnusableError("both a `system` key and a system turn are given; keep one of them")
    return (Turn(role="system", text=said(row["system"], "`system`")), *turns)


def sample_of(draft: Draft, *, index: int, line: int) -> Sample:
    """A draft as a sample, its turns in order and its placeholders as many as its media.

    Raises:
        UnusableError: it cannot be one.
    """
    name = draft.id
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    _check_order(draft.turns, draft.speakers)
    media = {modality: draft.media.get(modality, ()) for modality in MODALITIES}
    turns = draft.turns
    for modality, paths in media.items():
        turns = _with_media(turns, modality, len(paths), draft.speakers["user"])
    _check_boxes(draft.boxes, turns, len(media["image"]))
    return Sample(
        id=text_of(name, "`id`") if name not in (None, "") else str(index),
        turns=turns,
        images=media["image"],
        videos=media["video"],
        audios=media["audio"],
        boxes=draft.boxes,
        kind=text_of(draft.kind, "`kind`") if draft.kind is not None else "",
        index=index,
        line=line,
    )


def _check_boxes(boxes: tuple[Box, ...], turns: tuple[Turn, ...], pictures: int) -> None:
    """As many `<box>` as boxes, each in a picture that is there; without boxes `<box>` is text like any other."""
    if not boxes:
        return
    found = sum(turn.text.count(BOX_PLACEHOLDER) for turn in turns)
    if found != len(boxes):
        raise UnusableError(
            f"{len(boxes)} box{'' if len(boxes) == 1 else 'es'} but {found} {BOX_PLACEHOLDER} "
            f"placeholder{'' if found == 1 else 's'}; write one {BOX_PLACEHOLDER} for each box, in order"
        )
    for number, box in enumerate(boxes):
        if box.picture >= pictures:
            raise UnusableError(f"box {number} is in picture {box.picture}, but there are {pictures}, counted from 0")
        try:
            check_values(box)
        except DataError as error:
            raise UnusableError(str(error)) from None


def _check_order(turns: tuple[Turn, ...], names: Mapping[Role, str]) -> None:
    """A system turn at most in the first place, then user and assistant in turn, the assistant last; not too many."""
    check_count(turns)
    human, gpt = names["user"], names["assistant"]
    offset = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[offset:], start=offset):
        expected = "assistant" if (number - offset) % 2 else "user"
        if turn.role == expected:
            continue
        if turn.role == "system":
            raise UnusableError(f"turn {number} is a system turn; expected it in the first place only")
        if number == offset:
            raise UnusableError(f"the first turn is from {names[turn.role]}; expected {_a(human)} turn")
        raise UnusableError(
            f"turns {number - 1} and {number} are both from {names[turn.role]}; "
            f"expected {human} and {gpt} in turn: merge the two, or add what stands between them"
        )
    if turns[-1].role != "assistant":
        last = names[turns[-1].role]
        raise UnusableError(
            f"the last turn is from {last}; expected {_a(gpt)} turn: add the answer, or remove the turn"
        )


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeio' else 'a'} {noun}"


def _with_media(turns: tuple[Turn, ...], modality: Modality, count: int, human: str) -> tuple[Turn, ...]:
    """The turns with one placeholder a medium of this modality, in user turns only."""
    placeholder, word = PLACEHOLDERS[modality], WORDS[modality]
    for number, turn in enumerate(turns):
        if turn.role != "user" and placeholder in turn.text:
            raise UnusableError(
                f"turn {number} ({turn.role}) holds {placeholder}; {word}s stand in {human} turns only: "
                "remove it, or move it"
            )
    found = sum(turn.text.count(placeholder) for turn in turns)
    if found == count:
        return turns
    if count == 1 and found == 0:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        opened = Turn(role="user", text=f"{placeholder}\n{turns[first].text}")
        return (*turns[:first], opened, *turns[first + 1 :])
    raise UnusableError(
        f"{count} {word}{'' if count == 1 else 's'} but {found} {placeholder} "
        f"placeholder{'' if found == 1 else 's'}; write one {placeholder} for each {word}, in order"
    )
