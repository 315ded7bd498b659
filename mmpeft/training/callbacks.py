"""What listens to training: the metrics file, Ctrl-C, and what has to know where an epoch begins and ends."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmpeft.core.files import writing

RATE_PREFIX = "learning_rate/"


class MetricsFile(TrainerCallback):
    """Appends one JSON object a logged step to metrics.jsonl.

        {"step": 10, "epoch": 0.1, "loss": 0.7, "grad_norm": 1.2, "learning_rate": {"projector": 0.001},
         "samples_per_second": 11.2, "tokens_per_second": 390.0, "memory_bytes": 2100000000,
         "data_wait_seconds": 0.02, "data_waits": 1, "elapsed_seconds": 14.3}

    Where the Trainer evaluates (`eval_strategy`), its held-out loss has a line of its own:

        {"step": 10, "epoch": 0.1, "eval_loss": 0.6, "elapsed_seconds": 15.1}

    A run that resumes at step n drops the lines beyond n first, so that each step stands there once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep what belongs to steps already done."""
        elapsed = 0.0
        if args.process_index == 0:
            kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step]
            elapsed = kept[-1]["elapsed_seconds"] if kept else 0.0
            with writing(self.path):
                self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._start = time.perf_counter() - elapsed

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append a line."""
        if args.process_index != 0 or not logs or not {"loss", "eval_loss"} & set(logs):
            return
        elapsed = time.perf_counter() - self._start
        if "eval_loss" in logs:
            row = {"step": state.global_step, "epoch": logs.get("epoch"), "eval_loss": logs["eval_loss"]}
            self._append(row | {"elapsed_seconds": elapsed})
            return
        rates = {key.removeprefix(RATE_PREFIX): value for key, value in logs.items() if key.startswith(RATE_PREFIX)}
        row = {
            "step": state.global_step,
            "epoch": logs.get("epoch"),
            "loss": logs["loss"],
            "grad_norm": logs.get("grad_norm"),
            "learning_rate": rates or {"all": logs.get("learning_rate")},
            "samples_per_second": logs.get("samples_per_second"),
            "tokens_per_second": logs.get("tokens_per_second"),
            "memory_bytes": logs.get("memory_bytes"),
            "data_wait_seconds": logs.get("data_wait_seconds"),
            "data_waits": logs.get("data_waits"),
            "elapsed_seconds": elapsed,
        }
        self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line cut short by a kill is left out, a missing file has none."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C finishes the step, writes a checkpoint and stops; the second stops at once.

    Processes agree at the end of each step, so that all write the same checkpoint even where the signal
    reached only one of them.
    """

    def __init__(self, notify: Any = None) -> None:
        self.interrupted = False
        self._notify = notify or (lambda text: None)
        self._previous: Any = None
        self._process = os.getpid()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Take over SIGINT, where this is the main thread (Python delivers signals there only)."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A terminal sends Ctrl-C to the loader's workers too; they go on, and end with the loader.
            return
        if self.interrupted:
            self.release()
            raise KeyboardInterrupt
        self.interrupted = True
        self._notify("Ctrl-C: this step is finished and a checkpoint written; press it again to stop at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop if any process was interrupted."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.interrupted), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.interrupted = bool(flag.item())
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give SIGINT back."""
        self.release()

    def release(self) -> None:
        """Give SIGINT back to whoever had it; safe to call twice."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None


class EndOfReading(TrainerCallback):
    """Ends reading ahead before the next epoch asks the same workers."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of what was read ahead."""
        self.trainer.end_reading()


class EpochOfData(TrainerCallback):
    """Tells a data set that changes with the epoch which one begins.

    Loaders do it only on some ways: accelerate 1.15 leaves it out where a run goes on in the middle of an epoch.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Hand the epoch on."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(int(state.epoch or 0))
