"""The benchmark of int8 runs, on a model so small that its figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_int8_is_measured_beside_both_precisions(tmp_path):
    file = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/int8.py", "--quick", "--results", str(file)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text(encoding="utf-8"))
    assert set(found["tokens_per_second"]) == {"onnx_int8", "bf16", "fp32"}
    for ratio in found["ratio"].values():
        assert ratio["prefill"] > 0
        assert ratio["decode"] > 0
