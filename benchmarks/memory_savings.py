"""What each way to take less of a device's memory saves, and whether the plan knows it; writes memory_savings.*.

python benchmarks/memory_savings.py                  # on a simulated NPU (tests/npu_sim): its allocator counts bytes
python benchmarks/memory_savings.py --device cuda    # on a GPU
python benchmarks/memory_savings.py --only 2         # the first two cases, for tests; name files with --results

Each case is a run of its own of the model and data of benchmarks/memory_plan.py, two updates of a stage; measured is
the most that tensors took on the first process' device, planned what `mmpeft plan` says of them. A simulated device
has the sizes of tensors right and its own allocator's rounding, and says nothing about time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from memory_plan import write_data, write_model

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "memory_savings.json"

LORA = {"train": {"projector": "full", "language": {"r": 8}}}
LANGUAGE = {"train": {"language": "full"}}

CASES: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "LoRA, checkpointing": {**LORA, "compute": {"checkpointing": True}},
    "LoRA, checkpointing, what is kept on the host": {
        **LORA,
        "trainer": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}},
    },
    "LoRA, feature cache": {**LORA, "features": True},
    "LoRA, micro-batches of 1": {**LORA, "micro": 1},
    "LoRA, fsdp2 on 2": {**LORA, "distributed": "fsdp2", "processes": 2},
    "LoRA, zero3 on 2": {**LORA, "distributed": "zero3", "processes": 2},
    "LoRA, tensor_parallel: 3": {**LORA, "distributed": {"tensor_parallel": 3}, "processes": 3},
    "LoRA, fsdp2 with offload: all": {**LORA, "distributed": {"strategy": "fsdp2", "offload": "all"}, "processes": 1},
    "language in full": LANGUAGE,
    "language in full, optimizer on the host": {
        **LANGUAGE,
        "distributed": {"strategy": "zero2", "offload": "optimizer"},
    },
    "language in full, zero2 on 2": {**LANGUAGE, "distributed": "zero2", "processes": 2},
}
BASE = {"LoRA": "LoRA", "language in full": "language in full"}
"""By how a case's name begins: what it saves is counted from this one."""


def recipe_of(case: dict[str, Any], work: Path, output: Path, device: str) -> dict[str, Any]:
    """The recipe of a case."""
    stage = {
        "name": "stage",
        "train": case["train"],
        "max_steps": 2,
        "distributed": case.get("distributed", "ddp"),
        "trainer": {"save_strategy": "no", "logging_steps": 1, **case.get("trainer", {})},
    }
    return {
        "model": str(work / "model"),
        "data": {
            "train": str(work / "data" / "train.json"),
            "media_root": str(work / "data" / "images"),
            "workers": 0,
            "cache": {"features": case.get("features", False), "directory": str(work / "cache")},
        },
        "stages": [stage],
        "batch": {"size": 8, "micro": case.get("micro", 4)},
        "compute": case.get("compute", {}),
        "processes": case.get("processes", 1),
        "dtype": "bfloat16",
        "device": device,
        "output": str(output),
    }


def measure(name: str, work: Path, device: str, environment: dict[str, str]) -> dict[str, Any]:
    """Planned and measured of one case."""
    case = CASES[name]
    output = work / "runs" / name.translate(str.maketrans({" ": "-", ",": None, ":": None}))
    recipe = output.with_suffix(".yaml")
    recipe.parent.mkdir(exist_ok=True)
    recipe.write_text(yaml.safe_dump(recipe_of(case, work, output, device)), encoding="utf-8")
    words = [sys.executable, "-m", "mmpeft"]
    count = case.get("processes", 1)
    [plan] = json.loads(called([*words, "plan", recipe, "--json", "--processes", count], environment, name))["stages"]
    if case.get("features"):
        called([*words, "data", "cache", recipe], environment, name)
    called([*words, "run", recipe], environment | {"NPU_SIM_DEVICES": str(count)}, name)
    stage = json.loads((output / "stages" / "01-stage" / "stage.json").read_text(encoding="utf-8"))
    metrics = (output / "stages" / "01-stage" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    planned = plan["memory"]["peak"] - plan["memory"]["overhead"]
    measured = stage["figures"]["peak_memory_bytes"]
    return {
        "case": name,
        "measured_bytes": measured,
        "planned_bytes": planned,
        "error": (planned - measured) / measured,
        "how": plan["memory"]["how"],
        "losses": [row["loss"] for row in map(json.loads, metrics) if "loss" in row],
    }


def called(words: list[Any], environment: dict[str, str], name: str) -> str:
    """What a command prints."""
    done = subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return done.stdout


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| case | on the device | saved | planned | error |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['measured_bytes'] / 2**20:.0f} MiB | {row['saved']:.0%} | "
        f"{row['planned_bytes'] / 2**20:.0f} MiB | {row['error']:+.1%} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every case, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="npu", help="npu is the simulated one unless torch_npu is installed")
    parser.add_argument("--only", type=int, default=len(CASES), help="so many cases, from the first")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if given.device == "npu":
        library = called([sys.executable, ROOT / "tests" / "npu_sim" / "build.py"], environment, "the simulated NPU")
        stand_in = str(ROOT / "tests" / "npu_sim" / "stand_in")
        environment |= {
            "PYTHONPATH": stand_in,
            "NPU_SIM_LIBRARY": library.strip().splitlines()[-1],
            "ASCEND_HOME_PATH": stand_in,
        }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        environment["HF_DATASETS_CACHE"] = str(work / "datasets")
        write_model(work / "model")
        write_data(work / "data")
        for name in list(CASES)[: given.only]:
            rows.append(measure(name, work, given.device, environment))
            print(f"{name}: {rows[-1]['measured_bytes'] / 2**20:.1f} MiB, plan {rows[-1]['error']:+.1%}", flush=True)
    found = {row["case"]: row for row in rows}
    for row in rows:
        base = found[next(base for start, base in BASE.items() if row["case"].startswith(start))]
        row["saved"] = 1 - row["measured_bytes"] / base["measured_bytes"]
        row["largest_difference_of_loss"] = max(
            abs(ours - theirs) for ours, theirs in zip(row["losses"], base["losses"], strict=True)
        )
    given.results.parent.mkdir(parents=True, exist_ok=True)
    facts = {"device": "simulated NPU" if given.device == "npu" else given.device, "dtype": "bfloat16"}
    given.results.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    given.results.with_suffix(".md").write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
