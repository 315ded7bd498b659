"""Runs that go on with another number of processes, or shared out in another way: the losses of one that never stopped.

Each run is killed in its fourth step, the first of the second epoch, one behind its newest checkpoint.
"""

import json
import re
import shlex
import signal
import subprocess
import time
from collections import defaultdict
from itertools import chain
from pathlib import Path

import pytest

from mmpeft.core.files import read_json
from tests.pipeline.one_stage import assert_same, run_as, write_one_stage
from tests.processes import can_mount, command, environment, injected

WATCHED = """
import os
if "RANK" in os.environ or "ALONE" in os.environ:
    from mmpeft.training.trainer import MultimodalTrainer
    whole = MultimodalTrainer.training_step
    def training_step(self, model, inputs, *args, **kwargs):
        step = self.state.global_step
        if step == int(os.environ.get("KILLED_BEHIND", -1)):
            os._exit(9)
        with open(os.environ["SEEN"] + "." + os.environ.get("RANK", "0"), "a") as file:
            file.write(f"[{step}, {list(inputs['numbers'].values['numbers'])}]\\n")
        return whole(self, model, inputs, *args, **kwargs)
    MultimodalTrainer.training_step = training_step
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The recipe, and what one process makes of it."""
    path = write_one_stage(tmp_path_factory.mktemp("project"))
    done = run(path, "one", "ddp", 1)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def run(path, name, strategy, processes, *overrides, seen="seen", env=None):
    """A run that notes which samples each process has in each step."""
    watched = {**injected(path.parent / "injected", WATCHED), "SEEN": str(path.parent / f"{name}-{seen}")}
    alone = {"ALONE": "1"} if processes == 1 else {}
    return run_as(path, name, strategy, processes, *overrides, env={**watched, **alone, **(env or {})})


def seen(path, name):
    """For each step the samples that all processes had, blanks aside."""
    steps = defaultdict(list)
    for file in path.parent.glob(f"{name}.*"):
        for line in file.read_text().splitlines():
            step, numbers = json.loads(line)
            steps[step] += [number for number in numbers if number >= 0]
    return {step: sorted(numbers) for step, numbers in steps.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "batch"),
    [
        (("ddp", 1), ("ddp", 2), {}),
        (("ddp", 2), ("ddp", 1), {"packing": "false", "micro": "1"}),
        (("ddp", 4), ("ddp", 2), {"tokens": "200"}),
        (("fsdp2", 2), ("ddp", 1), {}),
        (("fsdp2", 2), ("fsdp2", 4), {}),
        (("fsdp2", 2), ("ddp", 2), {"packing": "true"}),
    ],
    ids=lambda value: "-".join(map(str, value if isinstance(value, tuple) else chain(*value.items()))) or "plain",
)
def test_a_run_goes_on_with_other_processes(project, before, after, batch, request):
    name = request.node.callspec.id
    overrides = [f"batch.{key}={value}" for key, value in batch.items()]
    killed = run(project, name, *before, *overrides, seen="first", env={"KILLED_BEHIND": "3"})
    assert killed.returncode == 9, killed.stderr[-3000:]
    done = run(project, name, *after, *overrides, seen="second")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "language: goes on from step 2 of 6" in done.stdout
    output, one = project.parent / name, project.parent / "one"
    assert read_json(output / "stages" / "01-language" / "stage.json")["resumed_from"] == 2
    assert_same(output, one)
    first, second, whole = (seen(project, each) for each in (f"{name}-first", f"{name}-second", "one-seen"))
    assert set(second) == {2, 3, 4, 5}
    assert {**{step: first[step] for step in (0, 1)}, **second} == whole


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "offload"), [("zero3", "all"), ("fsdp2", "all")])
def test_a_run_goes_on_with_what_waits_in_host_memory(project, strategy, offload):
    """As one does whose memory did not suffice."""
    name = f"{strategy}-offload"
    killed = run(project, name, strategy, 2, env={"KILLED_BEHIND": "3"})
    assert killed.returncode == 9, killed.stderr[-3000:]
    done = run(project, name, f"{{strategy: {strategy}, offload: {offload}}}", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "goes on from step 2 of 6" in done.stdout
    assert_same(project.parent / name, project.parent / "one")


AT_A_CHECKPOINT = """
import os
if "RANK" in os.environ:
    import signal, time
    from mmpeft.training.trainer import MultimodalTrainer
    whole = MultimodalTrainer._save_rng_state
    def _save_rng_state(self, folder):
        if self.state.global_step == int(os.environ["KILLED_AT"]) and os.environ["RANK"] == "1":
            # The first process has written all that is its own by then.
            time.sleep(2)
            open(os.path.join(folder, f"rng_state_{os.environ['RANK']}.pth"), "wb").write(b"half")
            with open(os.environ["KILLS"], "w") as file:
                file.write(str(time.time()))
            os.kill(os.getppid() if os.environ["KILLED"] == "launcher" else os.getpid(), signal.SIGKILL)
            time.sleep(30)
        whole(self, folder)
    MultimodalTrainer._save_rng_state = _save_rng_state
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "at", "strategy"),
    [("process", 4, "ddp"), ("launcher", 4, "zero2"), ("process", 2, "zero2"), ("process", 4, "fsdp2")],
)
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(project, strategy, killed, at):
    name = f"{strategy}-{killed}-{at}"
    kills = project.parent / f"{name}.kills"
    env = injected(project.parent / "at-a-checkpoint", AT_A_CHECKPOINT)
    env |= {"KILLED": killed, "KILLED_AT": str(at), "KILLS": str(kills)}
    ended = run(project, name, strategy, 2, env=env)
    # The run's pipes are closed when none of its processes is left who would write.
    assert time.time() - float(kills.read_text()) < 60
    assert ended.returncode == (-signal.SIGKILL if killed == "launcher" else 1)
    assert killed == "launcher" or "was ended by SIGKILL" in ended.stderr
    assert_goes_on(project, name, strategy, at - 2)
    output = project.parent / name
    assert "it was cut short while it was written" in (output / "again").read_text()


def assert_goes_on(path, name, strategy, step):
    """The same command ends with the losses of one process; what it says is kept in `again`."""
    done = run(path, name, strategy, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert f"goes on from step {step} of 6" in done.stdout if step else "goes on" not in done.stdout
    output = path.parent / name
    (output / "again").write_text(done.stderr)
    assert_same(output, path.parent / "one")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_the_newest_checkpoint_cut_short_is_left_for_the_one_before(project, strategy):
    name = f"{strategy}-cut"
    killed = run(project, name, strategy, 2, env={"KILLED_BEHIND": "5"})
    assert killed.returncode == 9, killed.stderr[-3000:]
    newest = project.parent / name / "stages" / "01-language" / "checkpoints" / "checkpoint-4"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:-100])
    assert_goes_on(project, name, strategy, 2)
    said = (project.parent / name / "again").read_text()
    assert f"checkpoint-4 is damaged ({largest.relative_to(newest).as_posix()} has" in said


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="no user namespaces here, so no file system to fill up")
@pytest.mark.parametrize("strategy", ["zero2", "fsdp2"])
def test_a_disk_that_fills_up_ends_all_processes_and_leaves_whole_checkpoints(project, strategy):
    """A real, small file system (tmpfs in a namespace of its own); where it has grown, the same command goes on."""
    small = project.parent / f"{strategy}-small"
    small.mkdir()
    words = command(
        project,
        f"output={small / 'run'}",
        f"stages.0.distributed={strategy}",
        "processes=2",
        "stages.0.trainer.save_steps=1",
        "stages.0.trainer.save_total_limit=40",
    )
    line = shlex.join(words)
    script = (
        f"mount -t tmpfs -o size=700k tmpfs {small}; {line}; echo status $?; date +%s; "
        f"ls -d {small}/run/stages/*/*/*/seal.json; "
        f"mount -o remount,size=64m {small}; {line} && cp -r {small}/run {small}-left"
    )
    begin = time.time()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env=environment(),
        cwd=small.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    status, moment, *rest = done.stdout.partition("status ")[2].split()
    assert status == "1"
    assert float(moment) - begin < 60
    full = re.search(r"cannot write \S+/checkpoint-(\d+): the disk is full: free space or choose", done.stderr)
    assert full, done.stderr[-3000:]
    before = int(full[1]) - 1
    # What other processes may have put there since has no seal.
    sealed = [Path(word).parent.name for word in rest if word.endswith("seal.json")]
    assert sealed == [f"checkpoint-{step}" for step in range(1, before + 1)]
    assert f"goes on from step {before} of 6" in done.stdout
    assert_same(small.with_name(f"{small.name}-left"), project.parent / "one")
