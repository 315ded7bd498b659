"""The benchmark of evaluation runs, on a model so small that its figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_evaluation_speed_compares_the_same_answers(tmp_path):
    file = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/evaluation_speed.py", "--tiny", "--rounds", "1", "--results", str(file)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    assert [case["new_tokens"] for case in cases] == [8, 32]
    for case in cases:
        assert case["prompt_tokens"] < case["prompt_tokens_padded"]
        assert case["ratio"] > 0
