"""The objects of a JSON array or JSON Lines file, one at a time, each with the line where it starts.

An array is walked object by object over a window of the text, so that a file of gigabytes needs the memory of
its largest object, and every object knows its line:

    [ {"id": 1, ...}, {"id": 2, ...}, {"id": 3, ...
      ^ consumed       ^ window: raw_decode from here, read on when the text ends too early

No object may be larger than `MAX_ROW` characters or `MAX_VALUES` values: memory stays bounded whatever the file.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mmpeft.core.errors import DataError
from mmpeft.data.sniff import HEAD_BYTES, UTF16, hint, looks_like

CHUNK = 1 << 20
"""Characters read at a time."""

MAX_ROW = 64 << 20
"""Characters of the longest row that is read; a conversation of a long book has a few million."""

MAX_VALUES = 4_000_000
"""Commas and opening brackets of the largest row that is read: each may be a Python object of 50 bytes or more."""

ESCAPE_WIDTH = 16
"""An error this close to the end of the window may come from a token cut by it (`\\u12`, `fals`)."""

SHOWN = 60
"""Characters of a key that a message quotes."""

_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = "\ufeff"
_TOO_LARGE = "put media into files instead of data: URLs, or split the conversation"


@dataclass(frozen=True, kw_only=True)
class Located:
    """A value and its line (from 1); `fault` says why there is no value, "" where there is one."""

    line: int
    value: Any = None
    fault: str = ""


def read_objects(path: Path) -> Iterator[Located]:
    """The values of a JSON array, or of a file with one JSON value a line.

    Which of the two it is, the first character says; `.jsonl` is always the latter. A row that says a key twice,
    or holds a number of thousands of digits, comes as a `Located` with a `fault`, and so does a bad line of a JSON
    Lines file.

    Raises:
        DataError: no such file, not UTF-8, or an array that is cut off, malformed or has a row that is too large:
            names file and line.
    """
    check_file(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = path.suffix == ".jsonl" or _first_character(file) == "{"
            file.seek(0)
            yield from _read_lines(file, path) if lines else _read_array(file, path)
    except UnicodeDecodeError as error:
        raise encoding_error(path) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def check_file(path: Path) -> None:
    """Make sure that `path` is a file.

    Raises:
        DataError: it is not: names the data files that lie beside it.
    """
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a directory; expected a .json or .jsonl file")
        if path.is_file():
            return
        if path.exists():
            raise DataError(f"{path}: is no regular file but a pipe or device; write its content to a file")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no usable path: {error}") from error
    if path.is_symlink():
        raise DataError(f"{path}: is a link to {path.readlink()}, which leads to no file; correct the link")
    folder = path.parent
    names = sorted(file.name for file in folder.glob("*.json*")) if folder.is_dir() else []
    beside = f"; data files beside it: {', '.join(names[:5])}" if names else ""
    raise DataError(f"{path}: no such file{beside}")


def encoding_error(path: Path) -> DataError:
    """Where and why a file is not UTF-8, found in pieces, for its lines may be of any length."""
    line, column, rest = 1, 1, b""
    with path.open("rb") as file:
        likeness = looks_like(file.read(HEAD_BYTES))
        advice = f"it looks like {likeness}" if likeness else "save the file as UTF-8"
        file.seek(0)
        ended = False
        while not ended:
            chunk = file.read(CHUNK)
            data, ended = rest + chunk, not chunk
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                # A character may be cut by the end of a piece.
                cut = error.reason == "unexpected end of data" and not ended
                good, rest = data[: error.start], data[error.start :]
                line, column = _after(good, line, column)
                if not cut:
                    return DataError(f"{path}:{line}: not UTF-8 (byte 0x{rest[0]:02x} at column {column}); {advice}")
            else:
                line, column = _after(text.encode(), line, column)
                rest = b""
    return DataError(f"{path}: not UTF-8; save the file as UTF-8")


def _after(data: bytes, line: int, column: int) -> tuple[int, int]:
    """Line and column, in bytes from 1, after `data`."""
    breaks = data.count(b"\n")
    return line + breaks, len(data) - data.rfind(b"\n") if breaks else column + len(data)


def _first_character(file: TextIO) -> str:
    while chunk := file.read(CHUNK):
        if text := chunk.lstrip():
            return text[0]
    return ""


class _Decoder:
    """Decodes JSON and notes what is not wrong enough for the parser to stop, but for the row to be refused."""

    def __init__(self) -> None:
        self.fault = ""
        self._strict = json.JSONDecoder(object_pairs_hook=self._object)
        # Python refuses whole numbers of more than 4,300 digits; as floats they let the row's end be found.
        self._lenient = json.JSONDecoder(object_pairs_hook=self._object, parse_int=float)

    def decode(self, text: str, position: int) -> tuple[Any, int]:
        """The value that starts at `position`, and where it ends; `fault` says why it is to be refused."""
        self.fault = ""
        try:
            return self._strict.raw_decode(text, position)
        except json.JSONDecodeError:
            raise
        except ValueError:
            value, end = self._lenient.raw_decode(text, position)
            self.fault = "it holds a whole number of more than 4300 digits; write it as a string, or shorten it"
            return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self.fault = f"the key {twice[:SHOWN]!r} stands twice in one object; keep one of the two"
        return value


def _read_lines(file: TextIO, path: Path) -> Iterator[Located]:
    decoder = _Decoder()
    for number, line in _lines(file):
        if line is not None and line.strip() in ("{", "["):
            raise DataError(
                f"{path}:{number}: what begins here goes over several lines; expected one sample a line, or, in a "
                "file whose name ends in .json, a JSON array of samples"
            )
        if line is None:
            yield Located(line=number, fault=f"the line has more than {MAX_ROW} characters; {_TOO_LARGE}")
        elif _values(line, 0, len(line)) > MAX_VALUES:
            yield Located(line=number, fault=f"the line has more than {MAX_VALUES} values; {_TOO_LARGE}")
        elif line.strip():
            yield _line(decoder, line, number)


def decode_line(raw: bytes, line: int) -> Located:
    """The value of one line of a JSON Lines file, read by itself; a fault where it is none.

    Args:
        raw: the line's bytes, its line break with them if it has one.
        line: its number, from 1.
    """
    try:
        text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        return Located(line=line, fault=f"not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1})")
    if len(text) > MAX_ROW:
        return Located(line=line, fault=f"the line has more than {MAX_ROW} characters; {_TOO_LARGE}")
    if _values(text, 0, len(text)) > MAX_VALUES:
        return Located(line=line, fault=f"the line has more than {MAX_VALUES} values; {_TOO_LARGE}")
    return _line(_Decoder(), text, line)


def _lines(file: TextIO) -> Iterator[tuple[int, str | None]]:
    """Lines with their numbers from 1; None for one that is too long."""
    number = 0
    while line := file.readline(MAX_ROW):
        number += 1
        if len(line) < MAX_ROW or line.endswith("\n"):
            yield number, line
            continue
        while (rest := file.readline(CHUNK)) and not rest.endswith("\n"):
            pass
        yield number, None if rest.strip() else line


def _line(decoder: _Decoder, line: str, number: int) -> Located:
    if line.startswith(_BOM):
        return Located(line=number, fault="begins with a byte order mark: were two files joined? Remove it")
    start = _SPACE.match(line).end()  # type: ignore[union-attr]
    try:
        value, end = decoder.decode(line, start)
        if not line[end:].strip(" \t\r\n"):
            return Located(line=number, fault=decoder.fault) if decoder.fault else Located(line=number, value=value)
        reason = f"found {line[end:].strip()[0]!r} after the first value, at column {end + 1}"
    except (ValueError, RecursionError) as error:
        reason = _said(error)
    cut = "" if line.endswith("\n") else "; it is the last line: was the file cut off?"
    return Located(line=number, fault=f"not one JSON object on one line: {reason}{cut}")


def _values(text: str, start: int, end: int) -> int:
    """How many values a text may hold at most; not counted where it is too short to hold too many."""
    if end - start <= MAX_VALUES:
        return 0
    return sum(text.count(mark, start, end) for mark in ",[{")


def _said(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Window:
    """The part of a text that has been read and not yet consumed; `_later` comes before what the file still holds."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.position, self.line = file, "", 0, 1
        self._later, self._taken = "", 0

    def more(self) -> bool:
        """Forget what was consumed and read on; False at the end of the file."""
        self.text, self.position = self.text[self.position :], 0
        size = max(CHUNK, len(self.text))
        chunk = self._later[self._taken : self._taken + size]
        self._taken += len(chunk)
        if not chunk:
            self._later, self._taken = "", 0
            chunk = self.file.read(size)
        self.text += chunk
        return bool(chunk)

    def shrink(self) -> None:
        """After a long row, look at what follows in short pieces again: the next may be small, and of many values."""
        kept = self.position + CHUNK
        if len(self.text) > kept + CHUNK:
            self._later, self._taken = self.text[kept:] + self._later[self._taken :], 0
            self.text = self.text[:kept]

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
    window, decoder = _Window(file), _Decoder()
    if not window.peek():
        raise DataError(f"{path}: the file is empty; expected a JSON array of samples, or one sample a line")
    if not window.take("["):
        head = window.text[window.position : window.position + HEAD_BYTES].encode("utf-8", "replace")
        raise DataError(
            f"{path}:{window.line}: found {window.peek()!r}{hint(head)}; "
            "expected a JSON array of samples, or one sample a line"
        )
    count, last = 0, "before the first sample ended"
    if window.take("]"):
        return
    while True:
        if not window.peek():
            raise DataError(_cut(path, window.line, f"before sample {count}, {last}"))
        line = window.line
        try:
            value = _decode(decoder, window, path, count)
        except _CutOffError:
            begun = f"in the middle of sample {count} (it starts in line {line}), {last}"
            raise DataError(_cut(path, window.line, begun)) from None
        yield Located(line=line, fault=decoder.fault) if decoder.fault else Located(line=line, value=value)
        name = f"id {value['id']!r}, "[:SHOWN] if isinstance(value, dict) and "id" in value else ""
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


def _decode(decoder: _Decoder, window: _Window, path: Path, count: int) -> Any:
    """The value that starts at the window's position; reads on until it is whole."""
    while True:
        try:
            value, end = decoder.decode(window.text, window.position)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated string")
            near_end = unfinished or error.pos >= len(window.text) - ESCAPE_WIDTH
            offset = error.pos - window.position
            if near_end:
                _check_size(window, path, count)
            if near_end and window.more():
                continue
            position = len(window.text) if unfinished else window.position + offset
            at_end = near_end and not set("]}") & set(window.text[position:])
            window.advance(position)
            if at_end:
                raise _CutOffError from None
            found = window.text[position : position + 20]
            zeros = f" (it looks like {UTF16})" if "\0" in found else ""
            raise DataError(
                f"{path}:{window.line}: sample {count} is not valid JSON: {error.msg.removesuffix(' at')}; "
                f"found {found!r}{zeros}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{window.line}: sample {count} cannot be read: {_said(error)}") from error
        if end < len(window.text) or not window.more():
            window.advance(end)
            window.shrink()
            return value


def _check_size(window: _Window, path: Path, count: int) -> None:
    """See that a value that fills the rest of the window, and does not end there, is not too large already."""
    start, end = window.position, len(window.text)
    large = end - start >= MAX_ROW
    if not large and _values(window.text, start, end) <= MAX_VALUES:
        return
    limit = f"{MAX_ROW} characters" if large else f"{MAX_VALUES} values"
    raise DataError(
        f"{path}:{window.line}: sample {count}, which starts here, has more than {limit} (is a quotation mark or a "
        f"bracket missing?); {_TOO_LARGE}; in a JSON Lines file (.jsonl) such a row can be left out alone"
    )
