"""What a file really is, by its first bytes, for messages about files that are not what their names say."""

HEAD_BYTES = 64
"""Bytes that `looks_like` wants to see."""

UTF16 = "UTF-16 text: save it as UTF-8"

_BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"\x1f\x8b", "gzip: unpack it"),
    (b"PK\x03\x04", "a zip archive: unpack it"),
    (b"BZh", "bzip2: unpack it"),
    (b"\xfd7zXZ", "xz: unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstandard: unpack it"),
    (b"\xff\xfe", UTF16),
    (b"\xfe\xff", UTF16),
    (b"PAR1", "parquet: name it .parquet"),
    (b"%PDF", "a PDF: render its pages"),
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF8", "GIF"),
    (b"OggS", "Ogg"),
    (b"fLaC", "FLAC"),
    (b"ID3", "MP3"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (b"SQLite format 3", "a SQLite database"),
)
MEDIA = frozenset(("PNG", "JPEG", "GIF", "Ogg", "FLAC", "MP3", "Matroska or WebM", "MP4 or MOV", "WebP", "WAV", "AVI"))
"""What `looks_like` calls media."""

_INSIDE = (
    (4, b"ftypheic", "HEIC: convert it to JPEG or PNG"),
    (4, b"ftypmif1", "HEIC: convert it to JPEG or PNG"),
    (4, b"ftypavif", "AVIF: convert it to JPEG or PNG"),
    (4, b"ftyp", "MP4 or MOV"),
    (8, b"WEBP", "WebP"),
    (8, b"WAVE", "WAV"),
    (8, b"AVI ", "AVI"),
)
_MARKUP = (
    (("<!doctype html", "<html", "<head", "<body"), "an HTML page: an error page of a download?"),
    (("<svg", "<?xml", "<!doctype svg"), "SVG or XML: render it as PNG"),
)


def looks_like(head: bytes) -> str:
    """What a file that begins with `head` is, and what to do about it; "" if nothing is known."""
    for beginning, name in _BEGINNINGS:
        if head.startswith(beginning):
            return name
    for place, mark, name in _INSIDE:
        if head[place:].startswith(mark):
            return name
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().decode("latin-1")
    for marks, name in _MARKUP:
        if text.startswith(marks):
            return name
    if head and not head.strip(b"\0"):
        return "nothing but zero bytes: a download or a copy that broke off"
    if b"\0" in head[:2] or head[3:4] == b"\0" == head[1:2]:
        return UTF16
    return ""


def hint(head: bytes) -> str:
    """` (it looks like …)`, or "" if nothing is known."""
    found = looks_like(head)
    return f" (it looks like {found})" if found else ""


def stranger(head: bytes) -> str:
    """What a file surely is that is neither picture, film nor recording; "" if it may be one."""
    found = looks_like(head)
    # Films and recordings may begin with bytes that look like UTF-16, or with zeros.
    return "" if found in MEDIA or found == UTF16 or not head.strip(b"\0") else found
