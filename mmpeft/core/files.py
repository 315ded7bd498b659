"""Files and directories that appear whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft.core.errors import OutputError


def output_error(error: OSError, path: Path) -> OutputError:
    """An `OutputError` that says why `path` could not be written and what to do."""
    advice = {
        errno.ENOSPC: "the disk is full: free space or choose another `output`",
        errno.EDQUOT: "the disk quota is used up: free space or choose another `output`",
        errno.EROFS: "the file system is read-only: choose another `output`",
        errno.EACCES: "no permission to write there: choose another `output` or change its permissions",
        errno.EPERM: "no permission to write there: choose another `output` or change its permissions",
    }
    return OutputError(f"cannot write {path}: {advice.get(error.errno or 0, error.strerror or str(error))}")


def ensure_directory(path: Path) -> Path:
    """Create `path` (and its parents) and prove that it can be written.

    Raises:
        OutputError: the place is read-only, full, or a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise OutputError(f"cannot write {path}: a file of that name exists; choose another `output`") from error
    except OSError as error:
        raise output_error(error, path) from error
    return path


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) under a temporary name, then rename it to `path`.

    Raises:
        OutputError: the place cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise output_error(error, path) from error


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON, Unicode kept as it is."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file (UTF-8)."""
    return json.loads(path.read_text(encoding="utf-8"))


_FULL = ("os error 28", "No space left", "PytorchStreamWriter", "inline_container", "iostream error")
"""What safetensors and torch.save say of a full disk, as far as it tells at all."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every way in which writing under `path` fails into an `OutputError`.

    safetensors and torch.save report a full disk by exceptions of their own.
    """
    try:
        yield
    except OSError as error:
        raise output_error(error, path) from error
    except Exception as error:
        text = str(error)
        if any(sign in text for sign in _FULL):
            raise output_error(OSError(errno.ENOSPC, text), path) from error
        if "os error 27" in text:
            raise output_error(OSError(errno.EFBIG, "the file is larger than allowed here"), path) from error
        raise


@contextlib.contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A directory to fill that takes the name `path` only when the block ends without an error.

    What stood at `path` before is kept until then, and is removed after the new one has its place:

        .adapter.1234.tmp/   being filled         -> adapter/
        adapter/             what stood before    -> .adapter.1234.old/ -> removed

    Raises:
        OutputError: the place cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        with writing(path):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                path.rename(old)
            temporary.rename(path)
    finally:
        if not path.exists() and old.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
