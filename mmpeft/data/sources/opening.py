"""What kind of container a path names, by its ending and, for folders, by what lies in it."""

from pathlib import Path

from mmpeft.data.reading import check_file, read_objects
from mmpeft.data.sources.base import Container, content_digest


def open_container(path: Path) -> Container:
    """The container at `path`.

    Raises:
        DataError: there is none, or none that can be read.
    """
    check_file(path)
    return Container(
        name="JSON Lines" if path.suffix == ".jsonl" else "JSON",
        root=path.parent,
        rows=lambda: read_objects(path),
        digest=lambda: content_digest(path),
    )
