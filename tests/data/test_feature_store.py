import logging
import os
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import save_file

from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion, default_directory

KEY, OTHER = "ab" * 20, "cd" * 20
LIMIT = 1 << 30


def entry(value=0.0, size=64):
    return Entry(
        tensors={"image/hidden": torch.full((3, size), value), "image/half": torch.ones(2, dtype=torch.bfloat16)},
        expansion=KeptExpansion(
            replacements=("<image>\n<image>", "é"),
            modalities=("image", "image"),
            tensors={"image_grid_thw": torch.tensor([[1, 2, 3]]), "flag": torch.tensor(True)},
            shapes={"pixel_values": ((2, 3, 32, 32), torch.float32)},
        ),
    )


def same(one, other):
    for left, right in ((one.tensors, other.tensors), (one.expansion.tensors, other.expansion.tensors)):
        assert set(left) == set(right)
        for name, tensor in left.items():
            assert tensor.dtype == right[name].dtype
            assert torch.equal(tensor, right[name])
    facts = [(e.expansion.replacements, e.expansion.modalities, e.expansion.shapes) for e in (one, other)]
    return facts[0] == facts[1]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(tmp_path):
    store = FeatureStore(tmp_path, LIMIT)
    assert store.read(KEY) is None
    assert store.write(KEY, entry(1.5))
    assert same(store.read(KEY), entry(1.5))
    assert same(FeatureStore(tmp_path, LIMIT).read(KEY), entry(1.5))
    (path,) = files(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    figures = store.figures()
    assert (figures["hits"], figures["misses"], figures["written"]) == (1, 1, 1)
    assert figures["bytes"] == path.stat().st_size


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_in_tensors(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def flip_in_text(path):
    data = path.read_bytes()
    assert data.count(b"2, 3, 32, 32") == 1
    path.write_bytes(data.replace(b"2, 3, 32, 32", b"2, 3, 32, 33"))


def empty(path):
    path.write_bytes(b"")


def no_facts(path):
    save_file({"feature:x": torch.zeros(2)}, path)


def link(path):
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("harm", [cut, flip_in_tensors, flip_in_text, empty, no_facts, link])
def test_what_is_broken_is_removed_and_made_anew(tmp_path, caplog, harm):
    store = FeatureStore(tmp_path, LIMIT)
    store.write(KEY, entry())
    path = store._path(KEY)
    harm(path)
    with caplog.at_level(logging.WARNING):
        assert store.read(KEY) is None
    assert "cannot be used and is made anew" in caplog.text
    assert not path.exists()
    assert store.figures()["broken"] == 1
    assert store.write(KEY, entry(2.0))
    assert same(store.read(KEY), entry(2.0))


def test_an_entry_under_another_s_name_is_not_used(tmp_path):
    store = FeatureStore(tmp_path, LIMIT)
    store.write(KEY, entry())
    target = store._path(OTHER)
    target.parent.mkdir(parents=True)
    store._path(KEY).rename(target)
    assert store.read(OTHER) is None
    assert not target.exists()


def test_a_key_cannot_leave_the_directory(tmp_path):
    for key in ("../../etc/passwd", "AB" * 20, "", "ab"):
        with pytest.raises(ValueError, match="hexadecimal"):
            FeatureStore(tmp_path, LIMIT).read(key)


WRITER = """
import sys, mmpeft, torch
from pathlib import Path
from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion
store = FeatureStore(Path(sys.argv[1]), 1 << 40)
big = Entry(tensors={"x": torch.ones(60_000_000)}, expansion=KeptExpansion(replacements=(), modalities=()))
print("ready", flush=True)
for number in range(1 << 20):
    store.write("ab" * 16 + f"{number:08x}", big)
    if number > 1:
        (store.directory / "ab" / ("ab" * 16 + f"{number - 1:08x}.safetensors")).unlink()
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    folder = tmp_path / "features" / "ab"
    # In the middle of a later write, with the first one whole.
    deadline = time.monotonic() + 60
    while not (folder.is_dir() and list(folder.glob(".*.tmp"))) and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    child.wait()
    child.stdout.close()
    temporary = list(folder.glob(".*.tmp"))
    store = FeatureStore(tmp_path, 1 << 40)
    whole = list(folder.glob("*.safetensors"))
    for path in whole:
        assert bool((store.read(path.stem).tensors["x"] == 1).all())
    assert store.figures()["broken"] == 0
    # What it left goes once it is old enough that nobody can be writing it.
    for path in temporary:
        os.utime(path, (1, 1))
    assert store.write(OTHER, entry())
    assert not list(folder.glob(".*.tmp"))


KEYS = [f"{number:02x}" * 20 for number in range(60)]


def _write_many(folder):
    store = FeatureStore(folder, LIMIT)
    for number, key in enumerate(KEYS):
        assert store.write(key, entry(number, size=5000))
        assert same(store.read(key), entry(number, size=5000))
    assert store.figures()["broken"] == 0


def test_two_processes_write_the_same_keys_at_once(tmp_path):
    context = get_context("spawn")
    children = [context.Process(target=_write_many, args=(tmp_path,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert len(files(tmp_path)) == len(KEYS)


def test_the_oldest_that_this_run_has_not_used_goes_first(tmp_path):
    before = FeatureStore(tmp_path, LIMIT)
    keys = [f"{number:02x}" * 20 for number in range(6)]
    for age, key in enumerate(keys):
        before.write(key, entry())
        os.utime(before._path(key), (1000 + age, 1000 + age))
    size = before.figures()["bytes"] // len(keys)
    store = FeatureStore(tmp_path, size * len(keys))
    assert store.read(keys[0]) is not None  # the oldest, but in use now
    assert store.write(OTHER, entry())
    assert not store.has(keys[1])
    assert all(store.has(key) for key in [*keys[3:], keys[0], OTHER])
    assert store.figures()["bytes"] <= store.limit_bytes
    assert store.figures()["evicted"] >= 1


def test_what_a_run_uses_itself_is_not_thrown_out_for_more(tmp_path):
    store = FeatureStore(tmp_path, 4000)
    keys = [f"{number:02x}" * 20 for number in range(6)]
    taken = [store.write(key, entry()) for key in keys]
    assert taken[0]
    assert not taken[-1]
    assert taken == sorted(taken, reverse=True), "what came first stays"
    assert store.figures()["refused"] == taken.count(False)
    assert store.figures()["bytes"] <= 4000
    assert store.off is None


FULL = """
import resource, sys, logging, mmpeft, torch
from pathlib import Path
from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
logging.basicConfig(stream=sys.stdout, format="%(message)s")
store = FeatureStore(Path(sys.argv[1]), 1 << 40)
big = Entry(tensors={"x": torch.ones(60_000)}, expansion=KeptExpansion(replacements=(), modalities=()))
print([store.write(key * 20, big) for key in ("ab", "cd")], bool(store.off), store.read("ab" * 20))
"""


def test_a_full_disk_turns_it_off_with_one_warning(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("the feature cache is off from here on") == 1
    assert "[False, False] True None" in done.stdout
    assert files(tmp_path) == []


def test_a_place_that_cannot_be_written_turns_it_off(tmp_path):
    (tmp_path / "features").write_text("a file where the directory should be")
    store = FeatureStore(tmp_path, LIMIT)
    assert not store.write(KEY, entry())
    assert "cannot be written" in store.off
    assert store.read(KEY) is None


def test_the_default_place_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("MMPEFT_CACHE", raising=False)
    assert default_directory() == tmp_path / "hf" / "mmpeft"
    monkeypatch.setenv("MMPEFT_CACHE", str(tmp_path / "own"))
    assert default_directory() == tmp_path / "own"
