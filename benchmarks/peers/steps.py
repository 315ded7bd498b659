"""Times and losses of a training by transformers' Trainer, which is what all programs train by; the workers import it.

`watch(file)` adds a callback to those that every Trainer of the process has. The clock starts where training begins,
with the model loaded and no sample read, and stops behind the last step.
"""

import json
import time
from pathlib import Path

import torch
import transformers.trainer
from transformers import TrainerCallback

STARTED = time.perf_counter()
"""When the libraries were imported, as good as."""


class Watch(TrainerCallback):
    """Writes `{"losses": of each step, "step_seconds": …, "epoch_seconds": …, "seconds", "before_seconds"}` to a file.

    Attributes:
        file: written when training ends; on a GPU with `gpu_peak_bytes` in it.
        cold: a folder that is to be empty when training begins, but for files of a page or less.
    """

    def __init__(self, file, cold=None):
        self.file, self.cold = Path(file), cold
        self.losses, self.steps, self.epochs = [], [], []

    def on_train_begin(self, args, state, control, **_):
        if self.cold and any(path.stat().st_size > 4096 for path in Path(self.cold).rglob("*") if path.is_file()):
            raise SystemExit("work was done before the clock started: the cache is not empty")
        self.begin = self.last = self.last_epoch = _now()

    def on_step_end(self, args, state, control, **_):
        now = _now()
        self.steps.append(now - self.last)
        self.last = now

    def on_epoch_end(self, args, state, control, **_):
        now = _now()
        self.epochs.append(now - self.last_epoch)
        self.last_epoch = now

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args, state, control, **_):
        found = {
            "losses": self.losses,
            "step_seconds": self.steps,
            "epoch_seconds": self.epochs,
            "seconds": _now() - self.begin,
            "before_seconds": self.begin - STARTED,
        }
        if torch.cuda.is_available():
            found["gpu_peak_bytes"] = torch.cuda.max_memory_allocated()
        self.file.write_text(json.dumps(found), encoding="utf-8")


def _now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(file, cold=None):
    """Let the Trainer of this process write what it did to `file`."""
    # Looked up here, for ms-swift puts another list in its place when it is imported.
    transformers.trainer.DEFAULT_CALLBACKS.append(Watch(file, cold))
