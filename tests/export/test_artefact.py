"""An export's directory: whole under its name, or nothing; never over what somebody else put there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from mmpeft.core.errors import OutputError, RunInterrupted
from mmpeft.export.artefact import artefact, check_output

KILLED = """
import sys, time
from mmpeft.export.artefact import artefact
with artefact(sys.argv[1], kind="test") as out:
    (out.folder / "a").write_text("new")
    print("ready", flush=True)
    time.sleep(60)
"""


def write(path, text="text", **options):
    with artefact(path, kind="merged model", **options) as out:
        (out.folder / "deep").mkdir()
        (out.folder / "deep" / "a.txt").write_text(text)
        out.facts["more"] = 1
    return path


def test_it_is_there_at_the_end_with_its_facts(tmp_path):
    path = write(tmp_path / "new" / "out", facts={"base": "b"})
    assert json.loads((path / "mmpeft.json").read_text()) == {
        "base": "b",
        "more": 1,
        "artefact": "merged model",
        "files": ["deep/a.txt"],
        "sizes": {"deep/a.txt": 4},
    }
    assert os.listdir(path.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("before", [False, True])
def test_whatever_ends_it_early_leaves_what_was_there(error, before, tmp_path):
    if before:
        write(tmp_path / "out", "old")

    def end_early(out):
        (out.folder / "a").write_text("new")
        raise error("in the middle")

    with pytest.raises((error, OutputError, RunInterrupted)), artefact(tmp_path / "out", kind="test") as out:
        end_early(out)
    assert os.listdir(tmp_path) == (["out"] if before else [])
    if before:
        assert (tmp_path / "out" / "deep" / "a.txt").read_text() == "old"


def test_ctrl_c_in_a_process_leaves_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    process.stdout.close()
    assert os.listdir(tmp_path) == []


def test_an_earlier_export_is_replaced_with_what_was_added_to_it(tmp_path):
    path = write(tmp_path / "out", "old")
    (path / "parity.json").write_text("{}")
    (path / "README.md").write_text("card")
    write(path, "new")
    assert (path / "deep" / "a.txt").read_text() == "new"
    assert sorted(os.listdir(path)) == ["deep", "mmpeft.json"]


@pytest.mark.parametrize("name", ["thesis.tex", "deep/thesis.tex", ".hidden"])
def test_a_file_of_somebody_else_is_never_deleted(name, tmp_path):
    path = write(tmp_path / "out")
    (path / name).write_text("three years of work")
    with pytest.raises(OutputError, match=rf"it holds {name}, which is not of an earlier export"):
        write(path)
    assert (path / name).read_text() == "three years of work"


def test_a_run_and_a_trained_adapter_are_never_replaced(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mmpeft.json").write_text('{"recipe": {}}')
    with pytest.raises(OutputError, match=r"it holds mmpeft.json"):
        write(tmp_path / "adapter")
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(OutputError, match="it holds inner"):
        write(tmp_path / "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a file of that name exists"):
        write(tmp_path / "file")


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    assert (write(tmp_path / "out") / "deep" / "a.txt").exists()


def test_what_is_read_is_never_replaced(tmp_path):
    base = write(tmp_path / "out" / "base")
    for out in (base, tmp_path / "out"):
        with pytest.raises(OutputError, match=r"would replace .*base, which is read"):
            write(out, sources=[base])
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(OutputError, match="which is read"):
        write(tmp_path / "link", sources=[base])


def test_there_has_to_be_room_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 10**9))
    write(tmp_path / "small", needs=10**8)
    with pytest.raises(OutputError, match=r"4\.72 GiB will be written, but 954 MiB are free"):
        write(tmp_path / "large", needs=5 * 10**9)
    assert os.listdir(tmp_path) == ["small"]


def test_ctrl_c_says_what_is_left(tmp_path):
    with (
        pytest.raises(RunInterrupted, match="stopped; nothing was left there"),
        artefact(tmp_path / "out", kind="test"),
    ):
        raise KeyboardInterrupt
    write(tmp_path / "out")
    with pytest.raises(RunInterrupted, match="what stood there is as it was"), artefact(tmp_path / "out", kind="test"):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_what_a_killed_export_has_left_is_removed_by_the_next(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait(20)
    process.stdout.close()
    (left,) = os.listdir(tmp_path)
    alive = tmp_path / f".out.{os.getpid()}.tmp"
    others = [tmp_path / ".out.notes.tmp", tmp_path / ".output.1.tmp"]
    write(tmp_path / "out")
    assert (tmp_path / left).exists()  # It might be of another machine, and at work.
    for folder in others:
        folder.mkdir()
    for folder in (tmp_path / left, *others):
        os.utime(folder, (1, 1))
    write(tmp_path / "out")
    assert not (tmp_path / left).exists()
    assert all(folder.exists() for folder in others)
    assert not alive.exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_kill_while_old_and_new_change_places_loses_neither(finished, tmp_path):
    path = write(tmp_path / "out", "old")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(20)
    aside = tmp_path / f".out.{ended.pid}.old"
    path.rename(aside)
    os.utime(aside, (1, 1))
    if finished:
        write(tmp_path / "other", "new").rename(path)
    with pytest.raises(ValueError, match="in the middle"), artefact(path, kind="test"):
        raise ValueError("in the middle")
    assert (path / "deep" / "a.txt").read_text() == ("new" if finished else "old")
    assert os.listdir(tmp_path) == ["out"]


def test_what_would_be_refused_can_be_asked_before_long_work(tmp_path):
    check_output(tmp_path / "deep" / "new")
    assert os.listdir(tmp_path) == []
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"it holds notes\.txt"):
        check_output(tmp_path)
    with pytest.raises(OutputError, match="will be written"):
        check_output(tmp_path / "new", needs=10**18)
    with pytest.raises(OutputError, match="which is read"):
        check_output(tmp_path / "a", sources=[write(tmp_path / "a" / "base")])
