"""Films and recordings opened with PyAV so that ffmpeg opens nothing but the one file it is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.core.optional import require
from mmpeft.data.roots import MediaFile
from mmpeft.data.sniff import HEAD_BYTES, stranger

MAX_MEDIA_BYTES = 8 * 2**30
"""Bytes of the largest film or recording that is opened."""

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flac,wav,mp3,aac,flv,asf,aiff"
"""ffmpeg's readers that may be used; playlists (hls, concat, dash), which name other files and URLs, are not."""


def _open_nothing(url: str, flags: int, options: dict[str, str]) -> None:
    raise PermissionError(f"a media file may not open another: {url}")


def check_file(path: MediaFile, name: str, kind: str) -> None:
    """See that a file is neither empty, larger than `MAX_MEDIA_BYTES`, nor plainly something else.

    Raises:
        DataError: it is.
    """
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{kind} {name!r} is an empty file (0 bytes); replace it, or remove its sample")
    if size > MAX_MEDIA_BYTES:
        raise DataError(f"{kind} {name!r} has {size} bytes; the limit is {MAX_MEDIA_BYTES}: cut or compress it")
    try:
        with path.open("rb") as file:
            found = stranger(file.read(HEAD_BYTES))
    except OSError as error:
        raise DataError(f"{kind} {name!r} cannot be read: {error.strerror or error}") from error
    if found:
        raise DataError(f"{kind} {name!r} is none (it looks like {found}); replace it, or remove its sample")


def check_streams(container: Any, name: str, kind: str) -> None:
    """See that there is a picture or a sound in a container: one that was cut off may hold an empty track.

    Raises:
        DataError: there is none.
    """
    if not container.streams.video and not container.streams.audio:
        raise DataError(f"{kind} {name!r} holds neither pictures nor sound; it is empty or cut off: replace it")


@contextmanager
def opened(path: MediaFile, name: str, *, kind: str, extra: str) -> Iterator[Any]:
    """A PyAV input container over a file that Python opened; every failure of ffmpeg inside becomes a DataError.

    Raises:
        DataError: the file is empty, too large, of no known format, or corrupt.
        MissingDependencyError: PyAV is not installed.
    """
    av = require("av", extra=extra)
    check_file(path, name, kind)
    try:
        with (
            path.open("rb") as file,
            av.open(
                file,
                "r",
                container_options={"format_whitelist": DEMUXERS},
                # Titles in Latin-1 and the like are no reason to refuse a film.
                metadata_errors="replace",
                io_open=_open_nothing,
            ) as container,
        ):
            yield container
    except av.error.MemoryError as error:
        raise DataError(
            f"{kind} {name!r} asks for more memory than there is, which corrupt sizes do too; replace it, or remove "
            "its sample"
        ) from error
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(
            f"{kind} {name!r} is corrupt, truncated or of an unknown format ({type(error).__name__}: "
            f"{getattr(error, 'strerror', None) or error}); replace it, or convert it to mp4 or wav"
        ) from error
