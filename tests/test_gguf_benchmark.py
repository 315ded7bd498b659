"""The benchmark of GGUF runs, on a model so small that its figures mean nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import write_data

pytest.importorskip("gguf", reason="the gguf package is not installed")

from tests.export.gguf_models import saved, siglip_llava

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None, reason="llama.cpp is not installed (pip install --no-deps cyllama)"
)
def test_gguf_is_compared_and_timed_beside_its_source(tmp_path):
    base, data, file = (
        saved(siglip_llava("llama"), tmp_path / "base"),
        write_data(tmp_path / "data"),
        tmp_path / "x.json",
    )
    options = ["--source", base, "--data", data / "eval.json", "--media-root", data / "images", "--results", file]
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/gguf_export.py",
            *map(str, options),
            *("--prompt", "20", "--new-tokens", "96", "--rounds", "1"),
        ],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["parity"]["questions"] == 4
    assert found["speed"]["ratio"]["prefill"] > 0
    assert found["speed"]["ratio"]["decode"] > 0
    assert found["speed"]["others_cores"] > -0.5
