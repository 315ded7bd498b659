"""Checkpoints that a stopped stage goes on from: sealed behind the last byte, proved whole before they are used.

    checkpoint-500/
      adapter_model.safetensors, optimizer.pt, ...    transformers' own files
      trainer_state.json                              the last that transformers writes
      seal.json                                       {file: {"bytes", "sha256"}} of all, the last of all

A run writes no checkpoint without a seal: one that has none was cut short, even where its `trainer_state.json` is
there, for other processes may have had files to write. One that is named by hand (the plain Trainer's) counts as whole
if that file can be read.
"""

import json
import logging
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmpeft.core.errors import OutputError
from mmpeft.core.files import read_json, write_json
from mmpeft.core.hashing import hash_file
from mmpeft.methods.checkpoint import remove_directory

logger = logging.getLogger(__name__)

SEAL = "seal.json"

_CUT_SHORT = "it was cut short while it was written"


def seal_checkpoint(folder: Path) -> None:
    """Write down what every file of a checkpoint holds, when all of them are written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    content = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in files
    }
    write_json(folder / SEAL, content)


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, as "optimizer.pt is cut short"; None if nothing is."""
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return _CUT_SHORT
    if not (folder / SEAL).exists():
        return None
    try:
        sealed = [(name, facts["bytes"], facts["sha256"]) for name, facts in read_json(folder / SEAL).items()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{SEAL} cannot be read"
    for name, size, digest in sealed:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if hash_file(path) != digest:
            return f"the content of {name} has changed"
    return None


def last_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """The newest sealed, whole checkpoint in `folder` and its step; newer ones are removed, and named."""
    numbered = {
        int(number.group(1)): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    for step, path in sorted(numbered.items(), reverse=True):
        damage = checkpoint_damage(path) if (path / SEAL).exists() else _CUT_SHORT
        if damage is None:
            return path, step
        logger.warning("%s is damaged (%s); it is removed, and the one before is looked at", path, damage)
        remove_directory(path)
    return None


def check_writers(folder: Path | None, *, zero: int | None, processes: int) -> None:
    """Make sure that these processes can go on from a checkpoint.

    DeepSpeed's has a share of the optimizer for each process that wrote it. All others are whole, and any number of
    processes goes on from them.

    Args:
        folder: None if they begin.
        zero: DeepSpeed's stage, if the processes share the work so.

    Raises:
        OutputError: they cannot; says what can.
    """
    if folder is None:
        return
    shares = sorted(folder.glob("global_step*/*_optim_states.pt"))
    writers = "DeepSpeed (zero1, zero2, zero3)" if shares else "ddp, fsdp2 or one process"
    if bool(shares) != (zero is not None):
        found = f"was written by {writers}"
    elif shares and len(shares) != processes:
        found = f"has the shares of {len(shares)} processes, and here are {processes}"
    else:
        return
    raise OutputError(
        f"cannot go on from {folder}: it {found}; go on as the run was begun, or start the stage over with --no-resume"
    )
