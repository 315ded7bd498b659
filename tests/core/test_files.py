import os
import resource
import subprocess
import sys
import textwrap

import pytest

from mmpeft.core.errors import OutputError
from mmpeft.core.files import ensure_directory, whole_directory, write_json, write_text, writing


def test_text_replaces_what_stood_there(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "一")
    write_text(path, "二")
    assert path.read_text(encoding="utf-8") == "二"
    assert os.listdir(path.parent) == ["b.txt"]


def test_directory_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "adapter"
    with whole_directory(path) as folder:
        (folder / "x").write_text("1")
        assert not path.exists()
    assert (path / "x").read_text() == "1"
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_failure_leaves_the_old_directory_whole(tmp_path):
    path = tmp_path / "adapter"
    with whole_directory(path) as folder:
        (folder / "x").write_text("old")

    def break_off():
        with whole_directory(path) as folder:
            (folder / "x").write_text("new")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        break_off()
    assert (path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match=r"out: a file of that name exists; choose another `output`"):
        ensure_directory(tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "the disk is full"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/3"), "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(30, "Read-only file system"), "read-only"),
        (PermissionError(13, "Permission denied"), "no permission"),
    ],
)
def test_every_way_of_failing_to_write_says_why(tmp_path, error, said):
    with pytest.raises(OutputError, match=said), writing(tmp_path / "x"):
        raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), writing(tmp_path / "x"):
        raise RuntimeError("something else")


def test_a_file_that_outgrows_its_limit_leaves_nothing(tmp_path):
    """A real write that the system refuses (RLIMIT_FSIZE), in a process of its own."""
    program = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from mmpeft.core.errors import OutputError
        from mmpeft.core.files import write_json
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_json(Path(sys.argv[1]), ["x" * 5000])
        except OutputError as error:
            print(error)
        """
    )
    write_json(tmp_path / "a.json", ["old"])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.json")], capture_output=True, text=True, check=True
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == limit
    assert "cannot write" in done.stdout
    assert os.listdir(tmp_path) == ["a.json"]
    assert "old" in (tmp_path / "a.json").read_text()
