"""How much of what two processes send goes on while they compute; writes benchmarks/results/overlap.json.

python benchmarks/overlap.py              # about three minutes on two cores
python benchmarks/overlap.py --quick      # fewer steps, for tests; name a file with --results

Each case is a real stage of two processes over gloo on one machine, with LoRA on the language model of
benchmarks/memory_plan.py. One step of it is traced by torch.profiler; `--traces FOLDER` keeps what it saw, for
chrome://tracing or Perfetto. `sending` is the time in which the first process had a collective under way, `hidden` the
part of it in which its training threads ran operations at once.

fsdp2                  layers are gathered while the ones before them compute
fsdp2, one by one      the same without, as torch does it on a CPU when it is left to itself
tower in full, ddp     gradients are averaged in buckets while backward goes on
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from memory_plan import write_data, write_model

import mmpeft  # isort: skip; before transformers, for torchvision's sake
import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from mmpeft.config.recipe import Recipe
from mmpeft.models.load import load_processor
from mmpeft.pipeline.arguments import plan_batch
from mmpeft.pipeline.cutting import measure
from mmpeft.pipeline.data import load_train
from mmpeft.pipeline.directory import RunDirectory
from mmpeft.pipeline.run import join_processes
from mmpeft.pipeline.stage import StageStart, make_trainer, prepare_stage

RESULT = Path(__file__).parent / "results" / "overlap.json"

CASES: dict[str, dict[str, Any]] = {
    "fsdp2": {"train": {"language": {"r": 8}}, "distributed": "fsdp2"},
    "fsdp2, one by one": {"train": {"language": {"r": 8}}, "distributed": "fsdp2"},
    "tower in full, ddp": {"train": {"vision": "full"}, "distributed": "ddp"},
}

QUICK = 3
"""Steps of a quick run, whose batches are small as well."""

Span = tuple[float, float]


def recipe_of(name: str, work: Path, steps: int) -> Recipe:
    """The recipe of a case."""
    case = CASES[name]
    return Recipe.from_dict(
        {
            "model": str(work / "model"),
            "data": {
                "train": str(work / "data" / "train.json"),
                "media_root": str(work / "data" / "images"),
                "workers": 0,
            },
            "stages": [{"name": "stage", "max_steps": steps, "trainer": {"save_strategy": "no"}, **case}],
            "batch": {"size": 8 if steps > QUICK else 2, "micro": 4 if steps > QUICK else 1},
            "dtype": "float32",
            "device": "cpu",
            "output": str(work / "runs" / name.replace(",", "").replace(" ", "-")),
        }
    )


class Tracing(TrainerCallback):
    """Times each step but the first, and traces the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.begin = steps, [], 0.0
        self.profile = profile(activities=[ProfilerActivity.CPU])

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.steps - 1:
            self.profile.start()
        self.begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.steps:
            self.profile.stop()
        elif state.global_step > 1:
            self.seconds.append(time.perf_counter() - self.begin)


def work_on(name: str, work: Path, steps: int) -> None:
    """A process' part of a case; the first writes what it saw."""
    recipe = recipe_of(name, work, steps)
    state = join_processes(recipe)
    stage = recipe.stages[0]
    processor = load_processor(str(work / "model"))
    dataset = load_train(recipe, processor)
    measure(recipe, dataset)
    prepared = prepare_stage(recipe, stage, StageStart(base=str(work / "model"), carried={}), seed=0)
    if name.endswith("one by one"):
        for unit in prepared.model.modules():
            if isinstance(unit, FSDPModule):
                unit.set_modules_to_forward_prefetch([])
                unit._set_unshard_async_op(False)
    batch = plan_batch(recipe, PartialState().num_processes)
    folder = RunDirectory(recipe.output).stage(0, stage.name)
    trainer = make_trainer(recipe, stage, prepared, (dataset, None), folder=folder, batch=batch, steps=steps)
    tracing = Tracing(steps)
    trainer.add_callback(tracing)
    trainer.train()
    if state.is_main_process:
        trace = work / f"{name}.json"
        tracing.profile.export_chrome_trace(str(trace))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        found = {"step_seconds": statistics.median(tracing.seconds), "loss": losses[-1], **overlap(trace)}
        (work / f"{name}.figures.json").write_text(json.dumps(found), encoding="utf-8")
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()


def overlap(trace: Path) -> dict[str, float]:
    """Seconds of sending, and those of them in which operations ran in threads that train."""
    events = [each for each in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if each.get("ph") == "X"]
    sending = merged(span(each) for each in events if each["name"].startswith("gloo:"))
    senders = {each["tid"] for each in events if each["name"].startswith("gloo:")}
    computing = merged(
        span(each) for each in events if each["name"].startswith("aten::") and each["tid"] not in senders
    )
    return {
        "sending": length(sending),
        "hidden": length(sending) + length(computing) - length(merged(sending + computing)),
    }


def span(event: dict[str, Any]) -> Span:
    """Begin and end in seconds."""
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same moments in spans that do not overlap."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(spans: Iterable[Span]) -> float:
    """Seconds of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


def main() -> None:
    """Run every case, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        name, work, steps = given.worker
        work_on(name, Path(work), int(steps))
        return
    steps = QUICK if given.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        work = given.traces or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        write_model(work / "model")
        write_data(work / "data")
        rows = [{"case": name, **run(name, work, steps)} for name in CASES]
    facts = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "processes": 2,
        "mmpeft": mmpeft.__version__,
        "torch": torch.__version__,
    }
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['case']}: {row['step_seconds']:.2f} s a step, {row['sending']:.2f} s sending, "
            f"{row['hidden'] / row['sending']:.0%} of it hidden"
        )


def run(name: str, work: Path, steps: int) -> dict[str, Any]:
    """What a case's first process saw."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, __file__, "--worker", name, str(work), str(steps)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads((work / f"{name}.figures.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
