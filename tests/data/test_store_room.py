import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion
from mmpeft.data.store_room import Room

KEYS = [f"{number:02x}" * 20 for number in range(12)]


def entry(numbers=1000):
    return Entry(tensors={"x": torch.ones(numbers)}, expansion=KeptExpansion(replacements=(), modalities=()))


def write_old(folder, count):
    """Entries of an earlier run, each older than the next; returns the bytes of one."""
    store = FeatureStore(folder, 1 << 30)
    for age, key in enumerate(KEYS[:count]):
        store.write(key, entry())
        os.utime(store._path(key), (1000 + age, 1000 + age))
    return store.figures()["bytes"] // count


def test_entries_that_another_run_has_read_since_do_not_give_way(tmp_path):
    size = write_old(tmp_path, 4)
    store = FeatureStore(tmp_path, size * 4 + 500)
    assert store.write(KEYS[4], entry())  # the oldest has gone
    FeatureStore(tmp_path, 1 << 30).read(KEYS[1])
    assert store.write(KEYS[5], entry())
    assert [store.has(key) for key in KEYS[:6]] == [False, True, False, True, True, True]
    assert store.figures()["evicted"] == 2


def test_two_runs_at_once_keep_the_bound_together(tmp_path):
    size = write_old(tmp_path, 1)
    limit = size * 6
    one, two = (FeatureStore(tmp_path, limit) for _ in range(2))
    taken = [store.write(key, entry()) for key, store in zip(KEYS, (one, two) * 6, strict=True)]
    assert taken[0]
    assert not taken[-1]
    # Each sees the other's entries when it has added a sixteenth of the bound itself.
    assert one.figures()["bytes"] <= limit + size


def test_a_full_store_does_not_look_through_its_directory_again_and_again(tmp_path):
    store = FeatureStore(tmp_path, 10_000)
    while store.write(KEYS[store.figures()["written"]], entry()):
        pass
    # What it does not count anew, it does not see: room that somebody makes now is for the next run.
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert not store.write(KEYS[-1], entry())
    assert FeatureStore(tmp_path, 10_000).write(KEYS[-1], entry())


def test_a_linked_folder_is_neither_read_nor_written_through(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    FeatureStore(elsewhere, 1 << 30).write(KEYS[1], entry())
    cache = tmp_path / "cache"
    (cache / "features").mkdir(parents=True)
    (cache / "features" / "01").symlink_to(elsewhere / "features" / "01")
    store = FeatureStore(cache, 1 << 30)
    assert store.read(KEYS[1]) is None
    assert not store.write("01" * 30, entry())
    assert "it is a link" in store.off
    assert [path.stem for path in elsewhere.rglob("*.safetensors")] == [KEYS[1]]


def test_files_that_a_killed_writer_left_go_when_they_are_old(tmp_path):
    FeatureStore(tmp_path, 1 << 30).write(KEYS[0], entry())
    old, new = (tmp_path / "features" / "00" / f".{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    Room(tmp_path / "features", 1 << 30).sweep()
    assert (old.exists(), new.exists()) == (False, True)


class _Reads(torch.utils.data.Dataset):
    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(KEYS)

    def __getitem__(self, index):
        found = self.store.read(KEYS[index])
        return -1 if found is None else int(found.tensors["x"].sum())


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_what_workers_of_a_loader_read_is_counted_here(tmp_path, context):
    write_old(tmp_path, 5)
    store = FeatureStore(tmp_path, 1 << 30)
    loader = DataLoader(_Reads(store), batch_size=2, num_workers=1, multiprocessing_context=context)
    assert torch.cat(list(loader)).tolist() == [1000] * 5 + [-1] * 7
    assert (store.figures()["hits"], store.figures()["misses"]) == (5, 7)


SMALL = """
import logging, os, sys, mmpeft, torch
from pathlib import Path
from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion
logging.basicConfig(stream=sys.stdout, format="%(message)s")
store = FeatureStore(Path(sys.argv[1]), 1 << 40)
big = Entry(tensors={"x": torch.ones(250_000)}, expansion=KeptExpansion(replacements=(), modalities=()))
taken = [store.write(f"{number:02x}" * 20, big) for number in range(9)]
print(taken.count(True), taken == sorted(taken, reverse=True), store.off)
print([store.read(f"{number:02x}" * 20) is not None for number in range(9)] == taken)
print(os.statvfs(sys.argv[1]).f_bavail > 0)
"""


def test_a_disk_that_fills_up_keeps_room_for_others_and_turns_the_store_off_once(tmp_path):
    script = 'mount -t tmpfs -o size=5m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "-", str(tmp_path), sys.executable, SMALL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare(1) to mount a small disk with")
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the feature cache is off from here on") == 1
    *_, told, read, left = done.stdout.splitlines()
    assert told.startswith("4 True ")
    assert "beside what is left for other files" in told
    assert (read, left) == ("True", "True")


READ_ONLY = """
import logging, os, sys, mmpeft, torch
from pathlib import Path
from mmpeft.data.feature_store import Entry, FeatureStore, KeptExpansion
logging.basicConfig(stream=sys.stdout, format="%(message)s")
entry = Entry(tensors={"x": torch.ones(5)}, expansion=KeptExpansion(replacements=(), modalities=()))
store = FeatureStore(Path(sys.argv[1]), 1 << 30)
store.write("00" * 20, entry)
for path in sorted(Path(sys.argv[1]).rglob("*")):
    path.chmod(0o555)
Path(sys.argv[1]).chmod(0o555)
if os.geteuid() == 0:
    os.chown(store._path("00" * 20), 65534, 65534)
    os.setgid(65534); os.setuid(65534)
print([store.write(key * 20, entry) for key in ("01", "02")], store.read("00" * 20) is not None, store.off)
"""


def test_a_read_only_directory_is_read_and_no_longer_written():
    # Not below pytest's own folder, which another run of pytest closes to other users.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        cache = Path(name) / "cache"
        command = [sys.executable, "-c", READ_ONLY, str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
        for path in (cache, *cache.rglob("*")):
            path.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the feature cache is off from here on") == 1
    assert "[False, False] True" in done.stdout
    assert "Permission denied" in done.stdout
