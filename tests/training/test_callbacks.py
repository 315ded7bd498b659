import io
import json
import os
import signal

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from mmpeft.training.callbacks import MetricsFile, StopOnInterrupt, read_metrics
from mmpeft.training.progress import ProgressDisplay

LOGS = {"loss": 0.5, "samples_per_second": 12.34, "tokens_per_second": 300.4, "memory_bytes": 3 * 2**29, "epoch": 0.5}


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")


def test_without_a_terminal_there_are_lines_with_speed_memory_and_time_left(args):
    out = io.StringIO()
    display = ProgressDisplay("projector", Console(file=out, width=40), interval=0)
    state = TrainerState(max_steps=10)
    display.on_train_begin(args, state, TrainerControl())
    state.global_step = 5
    display.on_log(args, state, TrainerControl(), logs=LOGS)
    (line,) = out.getvalue().splitlines()
    assert "projector 5/10 · loss 0.500 · 12.3 samples/s · 300 tokens/s · 1.5 GiB" in line
    assert line.endswith("s left")


def test_on_a_terminal_there_is_a_bar_and_closing_it_twice_is_safe(args):
    out = io.StringIO()
    display = ProgressDisplay("projector", Console(file=out, force_terminal=True, width=160))
    state = TrainerState(max_steps=10)
    display.on_train_begin(args, state, TrainerControl())
    state.global_step = 10
    display.on_step_end(args, state, TrainerControl())
    display.on_log(args, state, TrainerControl(), logs=LOGS)
    display.on_train_end(args, state, TrainerControl())
    display.close()
    assert "10/10" in out.getvalue()
    assert "12.3 samples/s" in out.getvalue()


def test_lines_beyond_the_step_resumed_from_are_dropped(args, tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": 1.0, "elapsed_seconds": 10.0 * step} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    callback = MetricsFile(path)
    callback.on_train_begin(args, TrainerState(global_step=2), TrainerControl())
    callback.on_log(args, TrainerState(global_step=3), TrainerControl(), logs=LOGS | {"learning_rate": 1e-3})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[2]["elapsed_seconds"] >= 20
    assert read_metrics(path)[2]["learning_rate"] == {"all": 1e-3}


def test_the_first_ctrl_c_saves_and_stops_the_second_stops_at_once(args):
    said = []
    callback = StopOnInterrupt(notify=said.append)
    before = signal.getsignal(signal.SIGINT)
    control = TrainerControl()
    callback.on_train_begin(args, TrainerState(), control)
    callback.on_step_end(args, TrainerState(), control)
    assert not control.should_training_stop
    os.kill(os.getpid(), signal.SIGINT)
    callback.on_step_end(args, TrainerState(), control)
    assert (control.should_save, control.should_training_stop) == (True, True)
    assert "press it again" in said[0]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_in_a_worker_of_the_loader_is_left_to_the_process_that_trains(args):
    said = []
    callback = StopOnInterrupt(notify=said.append)
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    try:
        worker = os.fork()
        if not worker:
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(len(said))
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 0
    finally:
        callback.release()
