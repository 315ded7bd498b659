import json
import os
import subprocess
import sys

import torch


def doctor(*arguments, path=None):
    """The command in a process of its own; modules in `path` hide those installed."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    return subprocess.run(
        [sys.executable, "-m", "mmpeft", "doctor", *arguments], capture_output=True, text=True, env=environment
    )


def test_a_sound_installation_ends_with_0_and_says_what_is_there():
    result = doctor()
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"torch         {torch.__version__}" in lines
    assert "pictures      can be decoded" in lines
    assert "audio         can be decoded" in lines
    assert lines[-1] == "nothing is broken"


def test_a_library_that_does_not_import_is_broken_and_the_status_is_1(tmp_path):
    (tmp_path / "soxr.py").write_text("raise OSError('libsoxr.so.0: cannot open shared object file')")
    result = doctor("--json", path=tmp_path)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert "does not import: OSError: libsoxr.so.0" in found["broken"][0]
    assert "pip install --force-reinstall soxr" in found["broken"][0]
    assert found["media"]["audio"] == "soxr missing; run: pip install 'mmpeft[audio]'"


def test_a_cuda_torchvision_beside_a_cpu_torch_is_recognised(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    (tmp_path / "torchvision" / "version.py").write_text("__version__ = '0.28.0+cu130'\n")
    warnings = json.loads(doctor("--json", path=tmp_path).stdout)["warnings"]
    if torch.__version__.endswith("+cpu"):
        assert "is a CUDA build, beside torch" in warnings[0]
        assert "pip install torchvision --index-url" in warnings[0]
    else:
        assert warnings == []
