"""Several processes of one command on this machine, where its recipe asks for them and no launcher has started it."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mmpeft.config.distributed import DistributedConfig
from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RunAgain
from mmpeft.models.devices import pick_device

STEP_SECONDS = 3600
"""How long processes may take to finish a step and write a checkpoint after Ctrl-C."""

WATCH_SECONDS = 1.0


def launched() -> bool:
    """Whether a launcher has started this process: ours, accelerate's or torchrun's."""
    return "LOCAL_RANK" in os.environ


def end_with_launcher() -> None:
    """End this process within two seconds when the one that launched it has gone, by a kill for instance.

    It would train on with nobody to end it, and write where the same command, started again, writes as well.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(WATCH_SECONDS)
        with contextlib.suppress(OSError):
            print(
                f"process {os.environ.get('RANK', 0)}: stopped, for its launcher has gone", file=sys.stderr, flush=True
            )
        os._exit(1)

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def processes_to_start(recipe: Recipe) -> int:
    """How many processes have to be started for a recipe; 0 where this one does.

    Raises:
        ModelError: the recipe's `device` is not here.
    """
    if launched():
        return 0
    shared = [stage.distributed for stage in recipe.stages if stage.distributed != DistributedConfig()]
    count = recipe.processes
    if count == "auto":
        device = pick_device(recipe.device)
        count = torch.get_device_module(device).device_count() if shared and device.type != "cpu" else 1
    offloads = any(each.offload != "none" for each in shared)
    return int(count) if count > 1 or offloads else 0


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m mmpeft` with these arguments in so many processes, by torchrun's agent; its exit status.

    Where one of them fails, the others are ended, and the status is that of the first; what went wrong it says itself.
    Where memory did not suffice and they can do with less (`RunAgain`), they are started again.
    """
    # It tells the story of each failure a second time.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    attempt = 1
    while (status := _attempt(arguments, processes, attempt)) == RunAgain.STATUS:
        attempt += 1
        print(f"the processes are started again (attempt {attempt})", file=sys.stderr, flush=True)
    return status


def _attempt(arguments: Sequence[str], processes: int, number: int) -> int:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"mmpeft-{os.getpid()}-{number}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=STEP_SECONDS,
    )
    with contextlib.suppress(SignalException):
        try:
            elastic_launch(config, sys.executable)("-m", "mmpeft", *arguments)
        except ChildFailedError as error:
            return _status(list(error.failures.values()))
        return 0
    return 130


def _status(failures: Sequence[ProcessFailure]) -> int:
    """Of the first that failed by itself: the agent ends the others, in the same second mostly, by SIGTERM."""
    if any(failure.exitcode == RunAgain.STATUS for failure in failures):
        return RunAgain.STATUS
    first = min(failures, key=lambda failure: (failure.exitcode == -signal.SIGTERM, failure.timestamp))
    if first.exitcode < 0:
        print(f"process {first.local_rank} was ended by {first.signal_name()}", file=sys.stderr)
    return first.exitcode if first.exitcode > 0 else 1
