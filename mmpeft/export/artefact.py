"""What an export writes: a whole directory under its final name, or nothing.

merged/
  (the files of the export)
  mmpeft.json      {"artefact": "merged model", "files": [...], "sizes": {...}, and what else is recorded}

By `artefact` and `files` a later export knows what it may replace: that, and nothing that somebody else put there. By
`sizes`, in bytes, `mmpeft push` knows whether a file has been cut short since.
"""

import contextlib
import glob
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpeft.core import units
from mmpeft.core.errors import OutputError, RunInterrupted
from mmpeft.core.files import ensure_directory, read_json, whole_directory, write_json
from mmpeft.models.load import FACTS_NAME

logger = logging.getLogger(__name__)

MERGED, INT8, BNB, ONNX, GGUF = "merged model", "int8 model", "bitsandbytes model", "ONNX model", "GGUF"
"""What mmpeft.json calls exports of models, as `artefact`."""

ADDED_LATER = ("README.md", "parity.json")
"""Files that other commands of mmpeft put into an artefact."""

_SPARE = 64 * 10**6
"""Bytes that stay free beside the weights: processor, configuration, and what others write meanwhile."""


@dataclass
class Artefact:
    """A directory that is being filled.

    Attributes:
        folder: where to write; it has its final name when the block ends.
        facts: content of mmpeft.json, to be added to until then.
    """

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def artefact(
    path: str | Path,
    *,
    kind: str,
    needs: int = 0,
    sources: Iterable[str | Path] = (),
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Artefact]:
    """A directory to fill that takes its name when the block ends without an error; else it leaves nothing behind.

        with artefact("merged", kind="merged model", needs=checkpoint.bytes, sources=[base, adapter]) as out:
            write_shards(stream, out.folder)
            out.facts["base_model"] = "owner/name"

    Args:
        path: the output directory: new, empty, or an earlier artefact of mmpeft, which is replaced at the end.
        kind: what it is, in words.
        needs: bytes that will be written, for which there has to be room before anything is.
        sources: directories that are read, which the output may not be or hold.
        facts: content of mmpeft.json.

    Raises:
        OutputError: the place holds something else, is a source, has no room, or cannot be written.
        RunInterrupted: Ctrl-C ended it.
    """
    path = Path(path).expanduser()
    _check_sources(path, sources)
    check_replaceable(path)
    ensure_directory(path.absolute().parent)
    _sweep(path.absolute())
    check_room(path, needs)
    stood = path.exists()
    try:
        with whole_directory(path.absolute()) as folder:
            made = Artefact(folder, dict(facts or {}))
            yield made
            files = sorted((str(file.relative_to(folder)), file) for file in folder.rglob("*") if file.is_file())
            written = {
                "files": [name for name, _ in files],
                "sizes": {name: file.stat().st_size for name, file in files},
            }
            write_json(folder / FACTS_NAME, {**made.facts, "artefact": kind, **written})
    except KeyboardInterrupt as error:
        left = "what stood there is as it was" if stood else "nothing was left there"
        raise RunInterrupted(f"{path}: stopped; {left}; the same command begins anew") from error


def check_output(path: str | Path, *, needs: int = 0, sources: Iterable[str | Path] = ()) -> None:
    """What `artefact` would refuse, to be asked before long work; nothing is written.

    Raises:
        OutputError: the place holds something else, is a source, or has no room.
    """
    path = Path(path).expanduser()
    _check_sources(path, sources)
    check_replaceable(path)
    check_room(path, needs)


def _sweep(path: Path) -> None:
    """Remove what an export to the same place has left that was killed, which had no time to do it itself.

    It is known by the number of a process that is no more, and, since another machine may number its processes alike,
    by nothing having been written into it for a while. What stood at `path` goes back there if the kill came while the
    two changed places.
    """
    for left in sorted(path.parent.glob(f".{glob.escape(path.name)}.*")):
        number, _, kind = left.name.removeprefix(f".{path.name}.").partition(".")
        dead = number.isdigit() and kind in ("tmp", "old") and not is_running(int(number))
        if not dead or time.time() - left.stat().st_mtime <= _SWEPT_AFTER:
            continue
        if kind == "old" and not path.exists():
            logger.warning("putting %s back to %s, after an export that was killed", left, path)
            left.rename(path)
        else:
            logger.warning("removing %s, which an export that was killed has left", left)
            shutil.rmtree(left, ignore_errors=True)


_SWEPT_AFTER = 600
"""Seconds without a new file."""


def is_running(process: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check_sources(path: Path, sources: Iterable[str | Path]) -> None:
    for source in map(Path, sources):
        if source.exists() and source.resolve().is_relative_to(path.resolve()):
            raise OutputError(f"{path}: the output would replace {source}, which is read; choose another output")


def check_replaceable(path: Path) -> None:
    """Refuse an output directory that holds anything but an earlier artefact of mmpeft.

    Raises:
        OutputError: names what is there.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise OutputError(f"{path}: a file of that name exists; choose another output")
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() or file.is_symlink()}
    foreign = sorted(found - _own_files(path) if any(path.iterdir()) else found)
    if foreign or (any(path.iterdir()) and not found):
        first = foreign[0] if foreign else next(path.iterdir()).name
        raise OutputError(
            f"{path}: it holds {first}, which is not of an earlier export; choose an empty or a new directory"
        )


def _own_files(path: Path) -> set[str]:
    """Names of the files that an earlier export wrote there; none where it was something else."""
    try:
        facts = read_json(path / FACTS_NAME)
        return {*facts["files"], FACTS_NAME, *ADDED_LATER} if facts["artefact"] else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def check_room(path: Path, needs: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OutputError: says how much there is and how much it takes.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needs + _SPARE:
        raise OutputError(
            f"{path}: {units.size(needs + _SPARE)} will be written, but {units.size(free)} are free there; "
            "free space or choose another output"
        )
