"""Which checkpoint a stopped stage goes on from."""

import json
import logging
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmpeft.methods.checkpoint import remove_directory

logger = logging.getLogger(__name__)


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint in `folder` and its step; those cut short are removed, and the log says so.

    The Trainer writes `trainer_state.json` last, so a checkpoint without a readable one was cut short.
    """
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if not number or not path.is_dir():
            continue
        if _is_whole(path):
            found.append((int(number.group(1)), path))
        else:
            logger.warning("%s was cut short while it was written; it is removed", path)
            remove_directory(path)
    if not found:
        return None
    step, path = max(found)
    return path, step


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
