"""Media that lie inside other files: `data:` URLs, and members written `container::member`.

    data:image/png;base64,iVBORw0…     the medium itself
    shards/000.tar::cat.jpg            a member of a tar archive
    train.parquet::image[17]           row 17 (from 0) of a column of embedded files
    data-0.arrow::images[17][0]        the first of several, in an Arrow file

Nothing is unpacked to disk, and links inside archives lead nowhere.
"""

import base64
import binascii
import functools
import io
import re
import tarfile
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from mmpeft.core.errors import DataError

MAX_MEDIUM_BYTES = 64 << 20
"""Bytes of the largest medium that is taken out of a URL or a table; a tar's members are not held in memory."""

MAX_ROW_GROUP = 2 << 30
"""Bytes, uncompressed, of the largest row group of a parquet file that is read."""

MEMBER = "::"
"""Stands between a container's path and its member's name."""

CONTAINERS = (".tar", ".parquet", ".arrow")

_CELL = re.compile(r"(?P<column>.+?)\[(?P<row>\d{1,12})\](?:\[(?P<item>\d{1,6})\])?")
_TYPES = {"picture": ("image",), "video": ("video",), "audio file": ("audio", "video")}
_SHOWN = 60

_Key = tuple[Path, int, int]


@dataclass(frozen=True)
class Embedded:
    """A medium inside another file, with as much of `pathlib.Path` as readers of media use."""

    size: int
    opener: Callable[[], BinaryIO]

    def open(self, mode: str = "rb") -> BinaryIO:
        """The medium's bytes as a binary file that can seek."""
        return self.opener()

    def stat(self) -> Any:
        """`st_size`: bytes of the medium."""
        return SimpleNamespace(st_size=self.size)


def shown(name: str | Path) -> str:
    """A medium's name for messages: `data:` URLs, which may be megabytes, cut short."""
    text = str(name)
    return text if len(text) <= _SHOWN or not text.startswith("data:") else f"{text[:_SHOWN]}…"


def data_url(url: str, *, kind: str, limit: int = MAX_MEDIUM_BYTES) -> Embedded:
    """The medium in a base64 `data:` URL.

    Args:
        url: the URL.
        kind: "picture", "video" or "audio file", which its type must be; anything else allows all three.
        limit: bytes at most.

    Raises:
        DataError: of another type, not base64, empty, or more than `limit` bytes (found before it is decoded).
    """
    head, comma, body = url.partition(",")
    what = f"{kind} {shown(url)!r}"
    if not comma or not head.endswith(";base64"):
        raise DataError(f"{what} is no base64 data: URL; expected data:image/png;base64,<content>")
    medium = head.removeprefix("data:").partition("/")[0].lower()
    allowed = _TYPES.get(kind, ("image", "video", "audio"))
    if medium not in allowed:
        raise DataError(f"{what} is of type {head[5:40]!r}; expected {' or '.join(f'{name}/…' for name in allowed)}")
    if len(body) * 3 // 4 > limit + 2:
        raise DataError(f"{what} holds {len(body) * 3 // 4} bytes; at most {limit} are read: put it into a file")
    try:
        content = base64.b64decode(urllib.parse.unquote(body) if "%" in body else body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{what} is no valid base64 ({error}); write it again") from None
    if not content:
        raise DataError(f"{what} is empty (0 bytes); write it again, or leave its sample out")
    return Embedded(len(content), functools.partial(io.BytesIO, content))


def split_member(name: str) -> tuple[str, str] | None:
    """(container, member) of `container::member`; None for a plain path."""
    container, found, member = name.partition(MEMBER)
    return (container, member) if found and member and container.lower().endswith(CONTAINERS) else None


def member_of(container: Path, member: str) -> Embedded:
    """A medium inside a tar archive, a parquet file or an Arrow stream file.

    The caller makes sure that `container` lies inside the media root.

    Raises:
        DataError: no such member, a link, larger than `MAX_MEDIUM_BYTES` (in a table), or an unreadable container.
    """
    what = f"{container.name}{MEMBER}{member}"
    try:
        state = container.stat()
        key = (container, state.st_mtime_ns, state.st_size)
        if container.suffix.lower() == ".tar":
            return _tar_member(key, member)
        content = _cell(key, member)
    except (OSError, tarfile.TarError, pa.ArrowException, ValueError, LookupError) as error:
        raise DataError(
            f"{what} cannot be read: {error}; write the container again, or leave the sample out"
        ) from error
    if not isinstance(content, bytes) or not content:
        raise DataError(f"{what} holds no bytes; fill it, or leave its sample out")
    if len(content) > MAX_MEDIUM_BYTES:
        raise DataError(f"{what} holds {len(content)} bytes; at most {MAX_MEDIUM_BYTES} are read: put it into a file")
    return Embedded(len(content), functools.partial(io.BytesIO, content))


@functools.lru_cache(maxsize=256)
def _tar_index(key: _Key) -> dict[str, tuple[int, int]]:
    """Name -> (offset, size) of every regular file in a tar archive; of files of one name the last, as tar has it."""
    index = {}
    with tarfile.open(key[0], "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
            if member.isreg() and not member.issparse():
                index[member.name] = (member.offset_data, member.size)
    return index


def _tar_member(key: _Key, member: str) -> Embedded:
    place = _tar_index(key).get(member)
    if place is None:
        raise DataError(f"{key[0].name} holds no regular file {member!r}; links in archives are not followed")
    offset, size = place
    if offset + size > key[2]:
        raise DataError(f"{key[0].name}{MEMBER}{member} is cut off: the archive ends before it; write it again")
    return Embedded(size, lambda: io.BufferedReader(_Window(key[0], offset, size)))


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._place = path.open("rb"), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._place))
        self._file.seek(self._offset + self._place)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _cell(key: _Key, member: str) -> object:
    cell = _CELL.fullmatch(member)
    if cell is None:
        raise DataError(f"{key[0].name}{MEMBER}{member} names no cell; expected column[row] or column[row][item]")
    row = int(cell["row"])
    blocks = _starts(key)
    number = max((number for number, start in enumerate(blocks) if start <= row), default=0)
    value = _block(key, number, cell["column"])[row - blocks[number]].as_py()
    if cell["item"] is not None:
        value = value[int(cell["item"])]
    return value["bytes"] if isinstance(value, dict) else value


@functools.lru_cache(maxsize=64)
def _starts(key: _Key) -> list[int]:
    """The first row of each row group or record batch."""
    if key[0].suffix.lower() == ".parquet":
        metadata = pq.read_metadata(key[0])
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    else:
        with pa.memory_map(str(key[0])) as source:
            sizes = [len(batch) for batch in pa.ipc.open_stream(source)]
    starts = [0]
    for size in sizes[:-1]:
        starts.append(starts[-1] + size)
    return starts


def check_row_group(file: pq.ParquetFile, number: int, path: Path) -> None:
    """See that a row group is not too large to be read whole.

    Raises:
        DataError: it is.
    """
    size = file.metadata.row_group(number).total_byte_size
    if size > MAX_ROW_GROUP:
        raise DataError(
            f"{path}: row group {number} has {size} bytes; at most {MAX_ROW_GROUP} are read: write it with smaller "
            "row groups"
        )


@functools.lru_cache(maxsize=4)
def _block(key: _Key, number: int, column: str) -> Any:
    """One column of one row group (in memory, as parquet is compressed) or record batch (a view of the file)."""
    if key[0].suffix.lower() == ".parquet":
        file = pq.ParquetFile(key[0])
        check_row_group(file, number, key[0])
        return file.read_row_group(number, columns=[column]).column(column)
    # The map stays open as long as the array that points into it.
    reader = pa.ipc.open_stream(pa.memory_map(str(key[0])))
    return next(batch for place, batch in enumerate(reader) if place == number).column(column)
