import json
import os
import subprocess
import sys

import pytest
import torch


def doctor(*arguments, path=None, **variables):
    """The command in a process of its own; modules in `path` hide those installed."""
    environment = {**os.environ, **variables, **({"PYTHONPATH": str(path)} if path else {})}
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
    assert any(line.startswith("interface lo") for line in lines)
    assert any(line.startswith("taken by") and "gloo" in line for line in lines)
    assert lines[-1] == "nothing is broken"


@pytest.mark.slow
def test_a_library_that_does_not_import_is_broken_and_the_status_is_1(tmp_path):
    (tmp_path / "soxr.py").write_text("raise OSError('libsoxr.so.0: cannot open shared object file')")
    result = doctor("--json", path=tmp_path)
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert "does not import: OSError: libsoxr.so.0" in found["broken"][0]
    assert "pip install --force-reinstall soxr" in found["broken"][0]
    assert found["media"]["audio"] == "soxr missing; run: pip install 'mmpeft[audio]'"


@pytest.mark.slow
def test_a_cuda_torchvision_beside_a_cpu_torch_is_recognised(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    (tmp_path / "torchvision" / "version.py").write_text("__version__ = '0.28.0+cu130'\n")
    warnings = json.loads(doctor("--json", path=tmp_path).stdout)["warnings"]
    if torch.__version__.endswith("+cpu"):
        assert "is a CUDA build, beside torch" in warnings[0]
        assert "pip install torchvision --index-url" in warnings[0]
    else:
        assert not [line for line in warnings if "is a CUDA build, beside torch" in line]


@pytest.mark.slow
def test_versions_that_do_not_go_together_and_an_interface_that_is_not_there_end_with_1(tmp_path):
    metadata = tmp_path / "torch_npu-2.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch-npu\nVersion: 2.9.0\n")
    (tmp_path / "torch_npu.py").write_text("")
    toolkit = tmp_path / "cann" / "x86_64-linux"
    toolkit.mkdir(parents=True)
    (toolkit / "ascend_toolkit_install.info").write_text("package_name=Ascend-cann-toolkit\nversion=8.2.RC1\n")
    result = doctor("--json", path=tmp_path, HCCL_SOCKET_IFNAME="=nowhere0", ASCEND_TOOLKIT_HOME=str(tmp_path / "cann"))
    assert result.returncode == 1
    found = json.loads(result.stdout)
    assert found["versions"]["CANN"] == "8.2.RC1"
    broken, warnings = "\n".join(found["broken"]), "\n".join(found["warnings"])
    assert f"torch-npu 2.9.0 with torch {torch.__version__}: each torch-npu is built for the torch" in broken
    assert "run: pip install 'torch==2.9.*' (see https://gitcode.com/Ascend/pytorch" in broken
    assert "HCCL_SOCKET_IFNAME==nowhere0 names no network interface" in broken
    assert "torch-npu 2.9.0 with CANN 8.2.RC1: this torch-npu was released with CANN 8.5.0" in warnings
