"""Measure `import mmpeft` in fresh processes; writes benchmarks/results/import_time.json.

python benchmarks/import_time.py                # measure and write
python benchmarks/import_time.py --limit 0.3    # measure, write nothing, fail if the best run took longer
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "import_time.json"
PROBE = "import time; start = time.perf_counter(); import mmpeft; print(time.perf_counter() - start)"


def measure(runs: int) -> list[float]:
    """Seconds that `import mmpeft` took, one figure a fresh process."""
    return [
        float(subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout)
        for _ in range(runs)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", type=float, metavar="SECONDS")
    options = parser.parse_args()
    seconds = measure(options.runs)
    sys.stdout.write(f"import mmpeft: best of {options.runs} {min(seconds):.3f} s\n")
    if options.limit is not None:
        return int(min(seconds) > options.limit)
    result = {
        "command": "python benchmarks/import_time.py",
        "runs": options.runs,
        "seconds": {"min": round(min(seconds), 4), "median": round(statistics.median(seconds), 4)},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
