"""Progress of a stage for people: a bar on a terminal, a line from time to time elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressDisplay(TrainerCallback):
    """Steps, loss, samples/s, tokens/s, memory and time left, on the first process.

    Args:
        name: of the stage.
        console: where to draw; a console that is no terminal gets a line every `interval` seconds.
        interval: seconds.
    """

    def __init__(self, name: str, console: Console, interval: float = 15.0) -> None:
        self.name, self.console, self.interval = name, console, interval
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = self._start = 0.0
        self._first_step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw the empty bar."""
        self._start = self._last = time.perf_counter()
        self._first_step = state.global_step
        if args.process_index != 0 or not self.console.is_terminal:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.name, total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move on."""
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest figures."""
        if args.process_index != 0 or not logs or "loss" not in logs:
            return
        figures = (
            f"loss {logs['loss']:.3f} · {logs.get('samples_per_second', 0):.1f} samples/s · "
            f"{logs.get('tokens_per_second', 0):.0f} tokens/s · {logs.get('memory_bytes', 0) / 2**30:.1f} GiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, figures=figures)
        elif time.perf_counter() - self._last > self.interval or state.global_step == state.max_steps:
            self._last = time.perf_counter()
            done = state.global_step - self._first_step
            left = (self._last - self._start) / max(done, 1) * (state.max_steps - state.global_step)
            self.console.print(
                f"  {self.name} {state.global_step}/{state.max_steps} · {figures} · {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the last state on the screen."""
        self.close()

    def close(self) -> None:
        """Stop drawing; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
