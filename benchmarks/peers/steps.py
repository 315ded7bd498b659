"""The time and loss of each step of a program that trains by transformers' Trainer; the workers import it."""

import json
import resource
import time
from pathlib import Path

from transformers import TrainerCallback, trainer


class Steps(TrainerCallback):
    """Writes `{"seconds": [...], "losses": [...], "peak_gib": …}` to the file that `watch` names."""

    file = Path()

    def __init__(self):
        self.begin, self.seconds, self.losses = 0.0, [], []

    def on_step_begin(self, args, state, control, **_):
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        self.seconds.append(time.perf_counter() - self.begin)

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args, state, control, **_):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = {"seconds": self.seconds, "losses": self.losses, "peak_gib": round(peak, 2)}
        Steps.file.write_text(json.dumps(found), encoding="utf-8")


def watch(file):
    """Let every Trainer of this process write its steps to `file`."""
    Steps.file = Path(file)
    trainer.DEFAULT_CALLBACKS.append(Steps)
