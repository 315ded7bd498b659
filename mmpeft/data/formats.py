r"""LLaVA's layout of a data file: rows of `id`, `image`, `conversations`, checked one by one.

    {"id": "0", "image": "a.png", "kind": "digit",
     "conversations": [{"from": "human", "value": "<image>\nWhich digit is it?"},
                       {"from": "gpt", "value": "7"}]}

`image` (or `images`) is one path or a list of them. Every picture has its `<image>` in a human turn, in
order; only where a sample has exactly one picture and no `<image>` at all is the picture put before the first
human turn's text. `video` and `<video>`, `audio` and `<audio>` are the same for films and
recordings. `from` may also say `user` or `assistant`. `id` and `kind` may be absent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpeft.config.names import did_you_mean, nearest
from mmpeft.core.errors import DataError
from mmpeft.core.types import MODALITIES, Modality
from mmpeft.data.problems import Problem
from mmpeft.data.reading import Located, read_objects
from mmpeft.data.types import PLACEHOLDERS, WORDS, Role, Sample, Turn

ROLES: Mapping[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
MEDIA_KEYS: Mapping[Modality, tuple[str, ...]] = {modality: (modality, f"{modality}s") for modality in MODALITIES}
"""The keys of a row that hold paths of media: one path, or a list of them."""

ROW_KEYS = ("id", *(key for keys in MEDIA_KEYS.values() for key in keys), "conversations", "kind")
TURN_KEYS = ("from", "value")


class _UnusableError(Exception):
    """Why a row is no sample; becomes a `Problem` or a `DataError` before it leaves this file."""


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


def read_rows(path: Path) -> Iterator[Row]:
    """Every row of a LLaVA file, in order, a problem standing where no sample can be made.

    Raises:
        DataError: the file as a whole cannot be read (see `read_objects`).
    """
    for index, located in enumerate(read_objects(path)):
        yield _row(located, index)


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a LLaVA file, checked, in order.

    Raises:
        DataError: the file cannot be read, or a row is no sample: names file, line, index and the fix.
    """
    for row in read_rows(path):
        if row.sample is None:
            raise DataError(row.problem.located(path) if row.problem else f"{path}: unreadable row")
        yield row.sample


def parse_row(row: Any, *, file: Path, index: int, line: int) -> Sample:
    """One decoded JSON row as a sample.

    Raises:
        DataError: the row is no sample: names file, line, index and the fix.
    """
    parsed = _row(Located(line=line, value=row), index)
    if parsed.sample is None:
        raise DataError(parsed.problem.located(file) if parsed.problem else f"{file}: unreadable row")
    return parsed.sample


def _row(located: Located, index: int) -> Row:
    row = located.value
    if located.fault:
        return Row(problem=Problem(index=index, line=located.line, reason=located.fault))
    ignored = tuple(key for key in row if key not in ROW_KEYS) if isinstance(row, dict) else ()
    try:
        return Row(sample=_sample(row, index=index, line=located.line), ignored=ignored)
    except _UnusableError as error:
        name = _name(row)
        return Row(
            problem=Problem(index=index, line=located.line, id=name, reason=str(error)),
            ignored=ignored,
        )


def _name(row: Any) -> str:
    """The row's id for a message, whatever else is wrong with the row."""
    value = row.get("id") if isinstance(row, dict) else None
    return str(value).encode("utf-8", "replace").decode() if isinstance(value, str | int) else ""


def _sample(row: Any, *, index: int, line: int) -> Sample:
    if not isinstance(row, dict):
        raise _UnusableError(f"found {_kind_of(row)}; expected an object with `conversations`")
    name = row.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)
    media = {modality: _paths(row, modality) for modality in MODALITIES}
    turns = _turns(row, any(media.values()))
    for modality, paths in media.items():
        turns = _with_media(turns, modality, len(paths))
    return Sample(
        id=_text(name, "`id`") if name not in (None, "") else str(index),
        turns=turns,
        images=media["image"],
        videos=media["video"],
        audios=media["audio"],
        kind=_text(row["kind"], "`kind`") if row.get("kind") is not None else "",
        index=index,
        line=line,
    )


def _kind_of(value: Any) -> str:
    kinds = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return kinds.get(type(value), "a list" if isinstance(value, list) else "an object")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise _UnusableError(f"{what} is {_kind_of(value)}; expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = f"U+{ord(value[error.start]):04X}"
        raise _UnusableError(
            f"{what} holds half of a surrogate pair ({code} at character {error.start}), which is no text; "
            "write the whole character"
        ) from None
    return value


def _paths(row: Mapping[str, Any], modality: Modality) -> tuple[str, ...]:
    found = [key for key in MEDIA_KEYS[modality] if row.get(key) is not None]
    if len(found) == 2:
        raise _UnusableError(f"both `{found[0]}` and `{found[1]}` are given; keep one of them")
    if not found:
        return ()
    key, value = found[0], row[found[0]]
    values = value if isinstance(value, list) else [value]
    if any(not isinstance(item, str) for item in values):
        wrong = next(item for item in values if not isinstance(item, str))
        raise _UnusableError(f"`{key}` holds {_kind_of(wrong)}; expected a path or a list of paths")
    if any(not item.strip() for item in values):
        raise _UnusableError(f"`{key}` holds an empty path; write the {WORDS[modality]}'s path, or leave `{key}` out")
    return tuple(_text(item, f"`{key}`") for item in values)


def _turns(row: Mapping[str, Any], media: bool) -> tuple[Turn, ...]:
    if row.get("conversations") is None:
        close = nearest("conversations", [key for key in row if key not in ROW_KEYS])
        hint = f"; did you mean `conversations` by `{close[0]}`?" if close else "; add human and gpt turns"
        picture = f"{_held(row)}, but " if media else ""
        raise _UnusableError(f"{picture}no `conversations`{hint}")
    conversations = row["conversations"]
    if not isinstance(conversations, list):
        raise _UnusableError(f"`conversations` is {_kind_of(conversations)}; expected a list of turns")
    if not conversations:
        picture = f"{_held(row)}, but " if media else ""
        raise _UnusableError(f"{picture}an empty conversation; expected at least a human turn and a gpt turn")
    turns = tuple(_turn(item, number) for number, item in enumerate(conversations))
    _check_order(turns)
    return turns


def _turn(item: Any, number: int) -> Turn:
    if not isinstance(item, dict):
        raise _UnusableError(f"turn {number} is {_kind_of(item)}; expected an object with `from` and `value`")
    for key in TURN_KEYS:
        if key not in item:
            keys = ", ".join(f"`{key}`" for key in item) or "none"
            raise _UnusableError(f"turn {number} has no `{key}` (its keys: {keys}); expected `from` and `value`")
    speaker, value = _text(item["from"], f"`from` of turn {number}"), item["value"]
    if speaker not in ROLES:
        raise _UnusableError(f"turn {number} is from {speaker!r}{did_you_mean(speaker, ROLES)}")
    value = _text(value, f"the text of turn {number}")
    if not value.strip():
        raise _UnusableError(f"turn {number} (from {speaker}) has an empty text; write it, or leave the sample out")
    return Turn(role=ROLES[speaker], text=value)


def _check_order(turns: tuple[Turn, ...]) -> None:
    """A system turn at most in the first place, then user and assistant in turn, the assistant last."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    offset = 1 if turns[0].role == "system" else 0
    for number, turn in enumerate(turns[offset:], start=offset):
        expected = "assistant" if (number - offset) % 2 else "user"
        if turn.role == expected:
            continue
        if turn.role == "system":
            raise _UnusableError(f"turn {number} is a system turn; expected it in the first place only")
        if number == offset:
            raise _UnusableError(f"the first turn is from {names[turn.role]}; expected a human turn")
        raise _UnusableError(
            f"turns {number - 1} and {number} are both from {names[turn.role]}; "
            "expected human and gpt in turn: merge the two, or add what stands between them"
        )
    if turns[-1].role != "assistant":
        raise _UnusableError(
            f"the last turn is from {names[turns[-1].role]}; expected a gpt turn: add the answer, or remove the turn"
        )


def _held(row: Mapping[str, Any]) -> str:
    """The first medium of a row, for a message."""
    return next(f"a {WORDS[name]}" for name, keys in MEDIA_KEYS.items() if any(row.get(key) for key in keys))


def _with_media(turns: tuple[Turn, ...], modality: Modality, count: int) -> tuple[Turn, ...]:
    """The turns with one placeholder a medium of this modality, in human turns only."""
    placeholder, word = PLACEHOLDERS[modality], WORDS[modality]
    for number, turn in enumerate(turns):
        if turn.role != "user" and placeholder in turn.text:
            raise _UnusableError(
                f"turn {number} ({turn.role}) holds {placeholder}; {word}s stand in human turns only: "
                "remove it, or move it"
            )
    found = sum(turn.text.count(placeholder) for turn in turns)
    if found == count:
        return turns
    if count == 1 and found == 0:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        opened = Turn(role="user", text=f"{placeholder}\n{turns[first].text}")
        return (*turns[:first], opened, *turns[first + 1 :])
    raise _UnusableError(
        f"{count} {word}{'' if count == 1 else 's'} but {found} {placeholder} "
        f"placeholder{'' if found == 1 else 's'}; write one {placeholder} for each {word}, in order"
    )
