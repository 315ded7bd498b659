"""Names of media in a data file become what can be opened: always inside the media root, never from the network.

a.png, film/b.mp4                      a file below the root
file:///data/images/a.png              the same, as a URL
shards/000.tar::cat.jpg                a member of a container below the root
data:image/png;base64,iVBORw0…         the medium itself
"""

import os
import re
import urllib.parse
from pathlib import Path

from mmpeft.core.errors import DataError
from mmpeft.data.embedded import Embedded, data_url, member_of, shown, split_member
from mmpeft.data.suffixes import SUFFIXES

MediaFile = Path | Embedded
"""Something with `open("rb")` and `stat().st_size`."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")
_FILE = re.compile(r"file:(?://(?:localhost)?(?=/))?", re.IGNORECASE)


def is_url(text: str) -> bool:
    """Whether a medium's name is a URL, not a path."""
    return _URL.match(text) is not None


def resolve_inside(name: str | Path, *, root: Path, kind: str) -> MediaFile:
    """What a data file's name of a medium stands for: a regular file inside `root`, links followed, or a part of one.

    Args:
        name: the name as the data file gives it: a path, a `file:` or `data:` URL, or `container::member`.
        root: the media root.
        kind: what messages call the medium: "picture", "video", "audio file".

    Raises:
        DataError: another URL, a path that leaves `root` (absolute, by `..` or by a link), or no such file or
            member; a `data:` URL that is malformed, too large, or of another kind.
    """
    text = str(name)
    if text.startswith("data:"):
        return data_url(text, kind=kind)
    if local := _FILE.match(text):
        text = urllib.parse.unquote(text[local.end() :])
    if is_url(text):
        raise DataError(f"{kind} {text!r} is a URL, and URLs are off: download it and write its path")
    parts = split_member(text)
    try:
        # A file may be called so itself.
        if parts is None or (root / text).exists():
            return _file_inside(text, root, kind)
        return member_of(_file_inside(parts[0], root, kind), parts[1])
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"{kind} {shown(text)!r} is no usable path: {error}") from error


def _file_inside(text: str, root: Path, kind: str) -> Path:
    base = root.resolve()
    path = (base / text).resolve()
    if not path.is_relative_to(base):
        raise DataError(
            f"{kind} {text!r} lies outside the media root {base} (at {path}); move it inside, or set media_root"
        )
    if not path.is_file():
        found = "is no regular file" if path.exists() else "does not exist"
        near = _near(base, text)
        advice = f"there is {near!r}: write that" if near else "correct the path, or set media_root"
        raise DataError(f"{kind} {text!r} {found} (tried {path}); {advice}")
    return path


def _near(base: Path, text: str) -> str:
    """A file that the name may have meant: with / for a backslash, or with another ending; "" if there is none."""
    name = text.replace("\\", "/")
    stem, suffix = os.path.splitext(name)
    alike = next((suffixes for suffixes in SUFFIXES.values() if suffix.lower() in suffixes), ())
    names = [name, *(stem + ending for suffix in alike for ending in (suffix, suffix.upper()))]
    for name in names:
        # Resolved only where something is there, for that is slow, and all of a data set may be missing.
        found = os.path.join(base, name)
        if os.path.isfile(found) and Path(found).resolve().is_relative_to(base):
            return name
    return ""
