"""Builds the simulated NPU, once for each content of its sources and each torch; prints the path of the result."""

import hashlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

HERE = Path(__file__).parent
SOURCES = ("device.cpp", "hccl.cpp", "counters.h")
FLAGS = ["-O0", "-g0"]


def library() -> Path:
    """The extension's path, built if it is not there yet (a minute of one core, once)."""
    content = b"".join((HERE / name).read_bytes() for name in SOURCES)
    key = hashlib.sha256(content + f"{torch.__version__} {sys.version} {FLAGS}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmpeft-npu-sim"
    folder = cache / key
    built = folder / "_npu_sim.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Two that build at once don't meet: the first to be ready names the folder.
        work = Path(tempfile.mkdtemp(dir=cache))
        os.environ.setdefault("MAX_JOBS", "2")
        # ninja stands beside this Python where pip has installed it.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
        load(
            "_npu_sim",
            [str(HERE / name) for name in SOURCES if name.endswith(".cpp")],
            extra_cflags=FLAGS,
            build_directory=str(work),
            is_python_module=False,
        )
        try:
            work.rename(folder)
        except OSError:
            shutil.rmtree(work)
    return built


if __name__ == "__main__":
    print(library())
