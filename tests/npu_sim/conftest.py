"""The simulated NPU is built once, and not at all where there is no compiler."""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BUILD = Path(__file__).parent / "build.py"


@pytest.fixture(scope="session")
def npu_library():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler (g++), which the simulated NPU is built with")
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        pytest.skip("no ninja, which the simulated NPU is built with")
    # Of several workers of pytest-xdist one builds, the others wait.
    with open(Path(tempfile.gettempdir()) / f"mmpeft-npu-sim-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([sys.executable, str(BUILD)], capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return Path(done.stdout.strip().splitlines()[-1])
