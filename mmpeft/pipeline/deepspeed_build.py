"""DeepSpeed's extensions, which it compiles when they are first used: a build that was killed blocks all later ones.

torch locks a build by a file, which the process that builds holds open, and waits without a word for as long as it is
there. Who was killed leaves it behind.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


def drop_dead_locks() -> None:
    """Remove the locks of builds that nobody is at; where that cannot be told, all stay."""
    for lock in _locks():
        if _held(lock):
            continue
        logger.warning("%s: the lock of a build that was ended in the midst of it; it is removed", lock)
        lock.unlink(missing_ok=True)


def _locks() -> Iterator[Path]:
    place = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    yield from Path(place or cache / "torch_extensions").glob("**/deepspeed_*/lock")


def _held(lock: Path) -> bool:
    """Whether a process has it open; also where there is no telling."""
    processes = Path("/proc")
    if not (processes / "self" / "fd").exists():
        return True
    wanted = lock.resolve()
    for folder in processes.glob("[0-9]*/fd"):
        try:
            if any(file.resolve() == wanted for file in folder.iterdir()):
                return True
        except OSError:
            # It has ended, or is another user's, who does not build in this one's folder.
            continue
    return False
