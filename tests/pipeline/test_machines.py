"""Several machines: on each a launcher of its own, here both on one, with an address where they meet."""

import socket
import subprocess

import pytest

from tests.pipeline.one_stage import assert_same, run_as, write_one_stage
from tests.processes import accelerate, command, environment

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_on_machines(path, settings, outputs):
    """What the launchers of so many machines ended with: status, output and errors of each."""
    where = ("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()))
    launchers = []
    for rank, output in enumerate(outputs):
        count = str(len(outputs))
        mine = ("--num_machines", count, "--num_processes", count, "--machine_rank", str(rank))
        words = command(
            path,
            f"output={path.parent / output}",
            "stages.0.distributed=auto",
            launcher=(*accelerate(settings), *mine, *where),
        )
        launchers.append(
            subprocess.Popen(
                words,
                cwd=path.parent,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [each.communicate(timeout=400) for each in launchers]
    return [(each.returncode, *texts) for each, texts in zip(launchers, said, strict=True)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_one_stage(tmp_path_factory.mktemp("project"))


def test_two_machines_follow_one_process(project):
    done = run_as(project, "one", "ddp", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = run_on_machines(project, "cpu_fsdp2", ("two", "two"))
    assert (first[0], second[0]) == (0, 0), first[2][-2000:] + second[2][-2000:]
    assert "report:" in first[1]
    # The first process alone speaks.
    assert second[1] == ""
    assert "Warning" not in first[2] + second[2]
    assert_same(project.parent / "two", project.parent / "one")


def test_an_output_that_not_all_machines_see_is_refused_before_training(project):
    first, second = run_on_machines(project, "cpu_ddp", ("here", "there"))
    assert (first[0], second[0]) == (1, 1)
    assert f"there on {socket.gethostname()} is not the directory that the first process writes" in second[2]
    assert not (project.parent / "here" / "stages").exists()
    assert not list((project.parent / "here").glob(".seen-*"))
