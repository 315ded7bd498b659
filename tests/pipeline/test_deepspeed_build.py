"""The lock of a build that was killed is taken away; that of one that goes on is not."""

import os

from mmpeft.pipeline.deepspeed_build import drop_dead_locks


def test_a_lock_goes_when_nobody_holds_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    # As torch.utils.file_baton does it.
    held = os.open(lock, os.O_CREAT | os.O_EXCL)
    drop_dead_locks()
    assert lock.exists()
    os.close(held)
    drop_dead_locks()
    assert not lock.exists()
    assert str(lock) in caplog.text
