"""Measure `mmpeft data check --no-media` on long files; writes benchmarks/results/data_check.json.

python benchmarks/data_check.py
"""

import json
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "data_check.json"
ROWS = (20_000, 100_000)
MACHINE = "2 cores of an AMD EPYC"
PROBE = """
import json, resource, sys, time
from mmpeft.data.check import check_data
start = time.perf_counter()
report = check_data(sys.argv[1], open_media=False)
print(json.dumps({"samples": report.samples, "errors": report.error_count,
                  "seconds": round(time.perf_counter() - start, 2),
                  "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}))
"""


def write(path: Path, rows: int) -> None:
    """A JSON array of `rows` samples of one picture and two to six turns, with ids of their own."""
    chance = random.Random(0)
    words = ["picture", "shows", "a", "red", "house", "beside", "the", "river", "where", "children", "play", "today"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turns = []
            for pair in range(chance.randint(1, 3)):
                question = " ".join(chance.choices(words, k=12)) + "?"
                opened = f"<image>\n{question}" if pair == 0 else question
                turns.append({"from": "human", "value": opened})
                turns.append({"from": "gpt", "value": " ".join(chance.choices(words, k=40)) + "."})
            row = {"id": f"row-{number}", "image": f"pictures/{number}.jpg", "conversations": turns}
            file.write(("[" if number == 0 else ",\n") + json.dumps(row, indent=1))
        file.write("]\n")


def main() -> int:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in ROWS:
            path = Path(folder) / f"{rows}.json"
            write(path, rows)
            done = subprocess.run([sys.executable, "-c", PROBE, str(path)], check=True, capture_output=True, text=True)
            figures = {"rows": rows, "file_mib": round(path.stat().st_size / 2**20, 1), **json.loads(done.stdout)}
            results.append(figures)
            sys.stdout.write(json.dumps(figures) + "\n")
    first, last = results
    grown = (last["peak_mib"] - first["peak_mib"]) / (last["file_mib"] - first["file_mib"])
    result = {
        "command": "python benchmarks/data_check.py",
        "results": results,
        "peak_growth_of_file_growth": round(grown, 3),
        "python": platform.python_version(),
        "machine": MACHINE,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
