"""Runs a workload by one program, in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workload.cases import LEARNING_RATE, Case, make_recipe, write_data
from workload.flops import products
from workload.shapes import SIZES, make_model

from mmpeft.config.recipe import Recipe
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.pipeline.stage import StageStart, prepare_stage

PEERS = Path(__file__).parent.parent / "peers"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One way to train.

    Attributes:
        worker: its script's name without `_worker.py`.
        python: of the environment that has it.
        package: the distribution whose version a table names.
    """

    name: str
    worker: str
    python: str
    package: str = "transformers"

    @property
    def version(self) -> str:
        """Such as `trl 1.16.0 (torch 2.13.0+cpu, transformers 5.24.0)`, of its environment."""
        ask = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
        packages = [self.package, "torch", "transformers"]
        done = subprocess.run([self.python, "-c", ask, *packages], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{self.package}, not installed"
        own, torch_version, transformers_version = done.stdout.split()
        return f"{self.package} {own} (torch {torch_version}, transformers {transformers_version})"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case on disk: base model, data, and the adapter from which all start."""

    case: Case
    size: str
    device: str
    model: Path
    adapter: Path
    data: Path
    scratch: Path


_CANNOT = ("ModuleNotFoundError", "PackageNotFoundError", "ImportError", "RecipeError: compute.compile")
"""Errors that say that a program, or a way to run it, is not for this machine or model."""


class Missing(Exception):
    """A program cannot run a case here; says why."""


def prepare(case: Case, *, size: str, device: str, folder: Path) -> Prepared:
    """Write what all programs read. The adapter is the one that mmpeft starts from by itself."""
    model = folder / f"{case.model}-{size}"
    if not model.exists():
        make_model(case.model, size, model)
    data, adapter = folder / case.name / "data", folder / case.name / "adapter"
    data.mkdir(parents=True)
    write_data(case, data, SIZES[size][case.model][1].side)
    recipe = Recipe.from_dict(make_recipe(case, model=model, data=data, output=folder / "none", device=device))
    stage = recipe.stages[0]
    ready = prepare_stage(recipe, stage, StageStart(base=str(model), carried={}), seed=recipe.seed)
    save_adapter(ready.model, adapter, processor=ready.processor)
    return Prepared(
        case=case, size=size, device=device, model=model, adapter=adapter, data=data, scratch=folder / case.name
    )


def run_program(program: Program, prepared: Prepared, *, epochs: int, compiled: bool = False) -> dict[str, Any]:
    """What the worker found (`peers/steps.py`), and `peak_bytes` of its process.

    Args:
        compiled: with torch.compile, in mmpeft; its first step then counts as much as the second.

    Raises:
        Missing: the program is not there, or does not take this model.
        SystemExit: it failed.
    """
    case = prepared.case
    scratch = Path(tempfile.mkdtemp(dir=prepared.scratch))
    recipe = make_recipe(case, model=prepared.model, data=prepared.data, output=scratch / "run", device=prepared.device)
    recipe["stages"][0]["epochs"] = epochs
    # An empty one for each run, so that nothing comes from the round before.
    recipe["data"]["cache"] = {"directory": str(scratch / "cache")}
    if compiled:
        recipe["compute"] = {"compile": True}
    found = run_worker(
        program,
        {
            "recipe": recipe,
            "kind": case.model,
            "model": str(prepared.model),
            "adapter": str(prepared.adapter),
            "data": str(prepared.data),
            "output": str(scratch / "output"),
            "dtype": case.dtype,
            "device": prepared.device,
            "epochs": epochs,
            "batch": case.batch,
            "learning_rate": LEARNING_RATE,
        },
        scratch,
    )
    return _without_first_step(found) if compiled else found


def _without_first_step(found: dict[str, Any]) -> dict[str, Any]:
    # The second step finds the cache as cold as the first does.
    first, second, *_ = found["step_seconds"]
    saved = first - second
    return {
        **found,
        "seconds": found["seconds"] - saved,
        "epoch_seconds": [found["epoch_seconds"][0] - saved, *found["epoch_seconds"][1:]],
    }


def matmul_rate(prepared: Prepared, tokens: int) -> float:
    """FLOP a second of the matrix product at the model's shapes over so many tokens."""
    work = {
        "device": prepared.device,
        "dtype": prepared.case.dtype,
        "tokens": tokens,
        "products": products(prepared.case, prepared.size),
    }
    scratch = Path(tempfile.mkdtemp(dir=prepared.scratch))
    found = run_worker(Program(name="matmul", worker="matmul", python=sys.executable), work, scratch)
    return float(found["flops_per_second"])


def run_worker(program: Program, work: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run a worker on a workload in `scratch`."""
    result, log = scratch / "result.json", scratch / "log.txt"
    file = scratch / "work.json"
    file.write_text(json.dumps({**work, "result": str(result)}), encoding="utf-8")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if program.python != sys.executable:
        environment.pop("PYTHONPATH", None)  # what it adds is for this environment
    if work["device"] == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program.python, str(PEERS / f"{program.worker}_worker.py"), str(file)],
            env=environment,
            cwd=scratch,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip()
        last = said.rpartition("\n")[2][:300]
        if any(error in last for error in _CANNOT):
            raise Missing(f"{program.name} cannot run here: {last}")
        sys.exit(f"{program.name} failed:\n{said[-4000:]}")
    found = json.loads(result.read_text(encoding="utf-8"))
    unit = 1 if sys.platform == "darwin" else 1024
    return {**found, "peak_bytes": found.get("gpu_peak_bytes", usage.ru_maxrss * unit)}
