import signal
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mmpeft.core.errors import RunAgain
from mmpeft.pipeline import launch
from tests.processes import environment


def failures(*codes):
    """Of processes that ended in the same second, as the agent tells of them: by number, not by time."""
    found = [ProcessFailure(local_rank=rank, pid=1, exitcode=code, error_file="<N/A>") for rank, code in codes]
    for failure in found:
        failure.timestamp = 1
    return found


@pytest.mark.parametrize(
    ("codes", "status", "said"),
    [
        (((0, -signal.SIGTERM), (1, 3)), 3, ""),
        (((0, 1), (1, RunAgain.STATUS)), RunAgain.STATUS, ""),
        (((0, -signal.SIGTERM), (1, -signal.SIGKILL)), 1, "process 1 was ended by SIGKILL\n"),
    ],
)
def test_the_status_is_that_of_the_process_that_failed_by_itself(capsys, codes, status, said):
    assert launch._status(failures(*codes)) == status
    assert capsys.readouterr().err == said


def test_processes_are_started_again_for_as_long_as_they_can_do_with_less(capsys, monkeypatch):
    statuses = [RunAgain.STATUS, RunAgain.STATUS, 1]
    monkeypatch.setattr(launch, "_attempt", lambda arguments, processes, number: statuses[number - 1])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch.launch(["run", "recipe.yaml"], 2) == 1
    assert "the processes are started again (attempt 3)" in capsys.readouterr().err


WORKER = """
import time
from mmpeft.pipeline.launch import end_with_launcher
end_with_launcher()
print('here', flush=True)
time.sleep(60)
"""


def test_a_process_ends_when_its_launcher_is_killed():
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', '''{WORKER}'''])"],
        env=environment(RANK="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline()
    launcher.kill()
    # It returns when nobody holds the other end of its pipes any more.
    _, said = launcher.communicate(timeout=10)
    # bitsandbytes, where it is installed, says on a CPU which of its kernels are not.
    assert said.endswith("process 1: stopped, for its launcher has gone\n")
