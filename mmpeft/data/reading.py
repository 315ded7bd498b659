"""The objects of a JSON array or JSON Lines file, one at a time, each with the line where it starts.

An array is walked object by object over a window of the text, so that a file of gigabytes needs the memory of
its largest object, and every object knows its line:

    [ {"id": 1, ...}, {"id": 2, ...}, {"id": 3, ...
      ^ consumed       ^ window: raw_decode from here, read on when the text ends too early
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mmpeft.core.errors import DataError

CHUNK = 1 << 20
"""Characters read at a time."""

ESCAPE_WIDTH = 16
"""An error this close to the end of the window may come from a token cut by it (`\\u12`, `fals`)."""

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, kw_only=True)
class Located:
    """A value and its line (from 1); `fault` says why there is no value, "" where there is one."""

    line: int
    value: Any = None
    fault: str = ""


def read_objects(path: Path) -> Iterator[Located]:
    """The values of a JSON array, or of a file with one JSON value a line.

    Which of the two it is, the first character says; `.jsonl` is always the latter.

    Raises:
        DataError: no such file, not UTF-8, or an array that is cut off or malformed: names file and line. A
            bad line of a JSON Lines file is no such error: it comes as a `Located` with a `fault`.
    """
    check_file(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = path.suffix == ".jsonl" or _first_character(file) == "{"
            file.seek(0)
            yield from _read_lines(file) if lines else _read_array(file, path)
    except UnicodeDecodeError as error:
        raise _encoding_error(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Make sure that `path` is a file.

    Raises:
        DataError: it is not: names the data files that lie beside it.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a directory; expected a .json or .jsonl file")
    if path.is_file():
        return
    folder = path.parent
    names = sorted(file.name for file in folder.glob("*.json*")) if folder.is_dir() else []
    beside = f"; data files beside it: {', '.join(names[:5])}" if names else ""
    raise DataError(f"{path}: no such file{beside}")


def _encoding_error(path: Path) -> DataError:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    found = "a UTF-16 byte order mark"
                return DataError(f"{path}:{number}: not UTF-8 ({found}); save the file as UTF-8")
    return DataError(f"{path}: not UTF-8; save the file as UTF-8")


def _first_character(file: TextIO) -> str:
    while chunk := file.read(CHUNK):
        if text := chunk.lstrip():
            return text[0]
    return ""


def _read_lines(file: TextIO) -> Iterator[Located]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield Located(line=number, value=json.loads(line))
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith("\n") else "; it is the last line: was the file cut off?"
            yield Located(line=number, fault=f"not one JSON object on one line: {_said(error)}{cut}")


def _said(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Window:
    """The part of a text that has been read and not yet consumed."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.position, self.line = file, "", 0, 1

    def more(self) -> bool:
        """Forget what was consumed and read on; False at the end of the file."""
        self.text, self.position = self.text[self.position :], 0
        chunk = self.file.read(max(CHUNK, len(self.text)))
        self.text += chunk
        return bool(chunk)

    def advance(self, position: int) -> None:
        self.line += self.text.count("\n", self.position, position)
        self.position = position

    def peek(self) -> str:
        """The next character that is no white space, "" at the end of the file."""
        while True:
            self.advance(_SPACE.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def take(self, character: str) -> bool:
        """Consume `character` if it comes next."""
        if self.peek() != character:
            return False
        self.advance(self.position + 1)
        return True


class _CutOffError(Exception):
    """The text ended inside a value."""


def _read_array(file: TextIO, path: Path) -> Iterator[Located]:
    window = _Window(file)
    if not window.peek():
        raise DataError(f"{path}: the file is empty; expected a JSON array of samples, or one sample a line")
    if not window.take("["):
        raise DataError(
            f"{path}:{window.line}: found {window.peek()!r}; expected a JSON array of samples, or one sample a line"
        )
    count, last = 0, "before the first sample ended"
    if window.take("]"):
        return
    while True:
        if not window.peek():
            raise DataError(_cut(path, window.line, f"before sample {count}, {last}"))
        line = window.line
        try:
            value = _decode(window, path, count)
        except _CutOffError:
            begun = f"in the middle of sample {count} (it starts in line {line}), {last}"
            raise DataError(_cut(path, window.line, begun)) from None
        yield Located(line=line, value=value)
        name = f"id {value['id']!r}, " if isinstance(value, dict) and "id" in value else ""
        last = f"after sample {count} ({name}line {line})"
        count += 1
        if window.take("]"):
            break
        if not window.take(","):
            if not window.peek():
                raise DataError(_cut(path, window.line, f"{last}, without a closing ]"))
            raise DataError(f"{path}:{window.line}: found {window.peek()!r} {last}; expected a comma or the closing ]")
    if extra := window.peek():
        raise DataError(f"{path}:{window.line}: found {extra!r} after the closing ]; expected the end of the file")


def _cut(path: Path, line: int, where: str) -> str:
    return f"{path}:{line}: the file ends {where}; it was cut off: fetch or write it again"


def _decode(window: _Window, path: Path, count: int) -> Any:
    """The value that starts at the window's position; reads on until it is whole."""
    decoder = json.JSONDecoder()
    while True:
        try:
            value, end = decoder.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string")
            near_end = unfinished or error.pos >= len(window.text) - ESCAPE_WIDTH
            if near_end and window.more():
                continue
            position = len(window.text) if unfinished else error.pos
            at_end = near_end and not set("]}") & set(window.text[position:])
            window.advance(position)
            if at_end:
                raise _CutOffError from None
            raise DataError(
                f"{path}:{window.line}: sample {count} is not valid JSON: {error.msg}; "
                f"found {window.text[position : position + 20]!r}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{window.line}: sample {count} cannot be read: {_said(error)}") from error
        if end < len(window.text) or not window.more():
            window.advance(end)
            return value
