"""A mended copy of a JSON data file: only what cannot change a sample's meaning is changed, and all of it is listed."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmpeft.core.errors import DataError, OutputError
from mmpeft.core.files import write_json, write_text
from mmpeft.data.checks.prints import Place, PlaceTable, print_of
from mmpeft.data.formats import Row, row_parser
from mmpeft.data.load_media import MediaLimits, placed
from mmpeft.data.pictures import media_names, read_medium
from mmpeft.data.reading import Located, read_objects
from mmpeft.data.types import IMAGE_PLACEHOLDER, Sample

_HALF = re.compile("[\ud800-\udfff]")

_TURNS = {"conversations": ("from", "value"), "messages": ("role", "content")}
"""Where layouts keep turns, and a turn's keys for who speaks and what is said."""

Change = dict[str, Any]
"""`line`, `index`, `change`, `before`, `after`; `why` where a sample is dropped."""


def mend_data(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    media_root: str | os.PathLike[str] | None = None,
    *,
    open_media: bool = True,
    columns: Mapping[str, str] | None = None,
    question: str | None = None,
) -> list[Change]:
    """Write `out` (JSON Lines if it ends in .jsonl, else a JSON array) and `out`.changes.json; `path` is not touched.

    Mended are: halves of surrogate pairs (replaced by U+FFFD), white space around answers, pictures without any
    `<image>` (put before the first human turn). Left out are repeated samples and rows that are still no sample or
    one of whose media cannot be read, or does not hold their box. Picture paths stay as they are, and so do keys:
    `columns` and `question` (as `read_rows` takes them) only say how the rows are read.

    Returns:
        Every change, in order, as in the list that is written.

    Raises:
        DataError: there is no such file, it is not JSON, or it is no list of samples from its start on.
        OutputError: `out` is the input, or cannot be written.
    """
    path, out = Path(path), Path(out)
    if out.exists() and path.exists() and out.samefile(path):
        raise OutputError(f"{out} is the file to be mended; write the copy to another name")
    root = Path(media_root) if media_root is not None else path.parent
    changes: list[Change] = []
    parse = row_parser(path, columns=columns, question=question)
    rows = list(_mended(path, parse, root if open_media else None, changes))
    separator, around = ("\n", ("", "\n")) if out.suffix == ".jsonl" else (",\n", ("[\n", "\n]\n"))
    text = separator.join(rows)
    write_text(out, around[0] + text + around[1] if rows else ("" if out.suffix == ".jsonl" else "[]\n"))
    write_json(out.with_name(f"{out.name}.changes.json"), changes)
    return changes


def count_changes(changes: list[Change]) -> dict[str, int]:
    """How many changes of each sort there are."""
    return dict(Counter(change["change"] for change in changes))


def _mended(
    path: Path, parse: Callable[[Located, int], Row], root: Path | None, changes: list[Change]
) -> Iterator[str]:
    seen, index = PlaceTable(), 0
    try:
        for index, located in enumerate(read_objects(path)):
            place = Place(index, located.line)
            if located.fault:
                _drop(changes, place, None, located.fault)
                continue
            mends: list[Change] = []
            row = _mend_row(located.value, place, mends)
            try:
                parsed = parse(Located(line=located.line, value=row), index)
                if parsed.sample is None:
                    raise DataError(parsed.problem.located(path) if parsed.problem else "unreadable row")
                sample = parsed.sample
                if root is not None:
                    for medium in media_names(sample):
                        if isinstance(fault := read_medium("decode", root, MediaLimits(), medium), str):
                            raise DataError(fault)
                    placed(sample, root=root, limits=MediaLimits())
            except DataError as error:
                _drop(changes, place, _whole(located.value), str(error))
                continue
            if first := seen.first(_said(sample), place):
                before = _whole(located.value)
                changes.append(_change(place, "duplicate removed", before, None) | {"why": f"the same as {first}"})
                continue
            changes += mends
            yield json.dumps(row, ensure_ascii=False)
    except DataError as error:
        if not seen.count:
            raise
        _drop(changes, Place(index + 1, 0), None, f"the rest of the file: {error}")


def _said(sample: Sample) -> int:
    media = (*sample.images, *sample.videos, *sample.audios)
    boxes = map(repr, sample.boxes)
    return print_of(*(part for turn in sample.turns for part in (turn.role, turn.text)), *media, *boxes)


def _change(place: Place, change: str, before: Any, after: Any) -> Change:
    return {"line": place.line, "index": place.index, "change": change, "before": before, "after": after}


def _drop(changes: list[Change], place: Place, row: Any, why: str) -> None:
    changes.append(_change(place, "sample dropped", row, None) | {"why": why})


def _mend_row(row: Any, place: Place, changes: list[Change]) -> Any:
    """The row with its safe mends; a row of another shape as it is, but for surrogates."""
    whole = _whole(row)
    if whole != row:
        changes.append(_change(place, "surrogate replaced", _escaped(row), whole))
    for key, (speaker, text) in _TURNS.items():
        turns = whole.get(key) if isinstance(whole, dict) else None
        if isinstance(turns, list) and all(
            isinstance(turn, dict) and isinstance(turn.get(text), str) for turn in turns
        ):
            _trim(turns, speaker, text, place, changes)
            _place_pictures(whole, turns, speaker, text, place, changes)
    return whole


def _trim(turns: list[dict[str, Any]], speaker: str, text: str, place: Place, changes: list[Change]) -> None:
    for turn in turns:
        trimmed = turn[text].strip()
        if turn.get(speaker) in ("gpt", "assistant") and trimmed and trimmed != turn[text]:
            changes.append(_change(place, "white space trimmed", turn[text], trimmed))
            turn[text] = trimmed


def _place_pictures(
    row: dict[str, Any], turns: list[dict[str, Any]], speaker: str, text: str, place: Place, changes: list[Change]
) -> None:
    given = row.get("image") if row.get("image") is not None else row.get("images")
    count = len(given) if isinstance(given, list) else int(isinstance(given, str))
    first = next((turn for turn in turns if turn.get(speaker) in ("human", "user")), None)
    if not count or first is None or any(IMAGE_PLACEHOLDER in turn[text] for turn in turns):
        return
    after = f"{IMAGE_PLACEHOLDER}\n" * count + first[text]
    changes.append(_change(place, "placeholder added", first[text], after))
    first[text] = after


def _whole(value: Any) -> Any:
    """A copy in which every half of a surrogate pair is U+FFFD."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(item) for key, item in value.items()}
    return value


def _escaped(row: Any) -> str:
    """The row as ASCII JSON, the only form in which halves of pairs can be written to a file."""
    return json.dumps(row)
