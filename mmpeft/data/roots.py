"""Names of media in a data file become paths: always regular files inside the media root, never a URL."""

import re
from pathlib import Path

from mmpeft.core.errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


def is_url(text: str) -> bool:
    """Whether a medium's name is a URL, which is never fetched, not a path."""
    return _URL.match(text) is not None


def resolve_inside(name: str | Path, *, root: Path, kind: str) -> Path:
    """Where a data file's medium lies, links followed; always a regular file inside `root`.

    Args:
        name: the name as the data file gives it.
        root: the media root.
        kind: what messages call the medium: "picture", "video", "audio file".

    Raises:
        DataError: a URL, a path that leaves `root` (absolute, by `..` or by a link), or no such file.
    """
    text = str(name)
    if is_url(text):
        raise DataError(f"{kind} {text!r} is a URL, and URLs are off: download it and write its path")
    try:
        base = root.resolve()
        path = (base / text).resolve()
        inside = path.is_relative_to(base)
        regular = inside and path.is_file()
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"{kind} {text!r} is no usable path: {error}") from error
    if not inside:
        raise DataError(
            f"{kind} {text!r} lies outside the media root {base} (at {path}); move it inside, or set media_root"
        )
    if not regular:
        found = "is no regular file" if path.exists() else "does not exist"
        raise DataError(f"{kind} {text!r} {found} (tried {path}); correct the path, or set media_root")
    return path
