"""Training speed at equal maths: mmpeft against TRL, and against ms-swift where it is given, in alternation.

    python benchmarks/training_speed.py [--case NAME|--quick] [--rounds 2] [--minutes 8] [--trl PYTHON] [--swift PYTHON]

A LLaVA of the shape of SmolLM2-135M with a CLIP ViT-B/16 tower, and a Qwen2.5-VL of like size (random weights, real
processors), train on the same samples in the same order, from the same adapter, at the same learning rate. Cases are in
benchmarks/workload/cases.py. mmpeft runs a recipe, with everything at its default that the comparison does not fix; the
peers run their own best settings that are exact (benchmarks/peers). Every program has a process of its own in each
round, and they take turns. The clock starts with the model loaded and nothing read, an empty cache included, and stops
behind the last step; where a case has several epochs, mmpeft also runs one alone, and a peer's first epoch is held
against it. Losses are compared step for step: above 1e-3 of each other in float32, or 2e-2 in bfloat16, the run ends
and nothing of that round is written (a second or third peer is left out instead, by name). Useful FLOP are defined in
benchmarks/workload/flops.py; the matrix product is measured in each round. Peak memory is that of the training process,
or of the GPU's allocator.

torch.compile is off in runs as short as these (`compute.compile: auto`), for it takes tens of seconds once a run. With
`--compiled`, mmpeft also runs with it, and its first step, in which it compiles, counts as much as the second.

`--device cuda --size 0.5b|3b|7b` does the same on a GPU in bfloat16, with absolute samples/s and FLOP/s; it has
not been run on hardware yet.
Writes benchmarks/results/training_speed.json and .md, anew after each round, where every case runs; of some cases only
where --results says so. The figure to trust is the ratio.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from workload.cases import CASES, QUICK, Case
from workload.programs import Missing, Prepared, Program, matmul_rate, prepare, run_program
from workload.shapes import SIZES
from workload.table import OURS, OtherMaths, case_rows, check_losses, markdown

from mmpeft.pipeline.facts import hardware, versions

RESULTS = Path(__file__).parent / "results" / "training_speed.json"
ONE_EPOCH = "mmpeft, one epoch"
COMPILED = "mmpeft, compiled"


class Rounds:
    """What the rounds of one case have found so far."""

    def __init__(self, prepared: Prepared, programs: list[Program], *, compiled: bool = False) -> None:
        self.prepared, self.programs, self.compiled = prepared, programs, compiled
        self.found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.rates: list[float] = []
        self.left_out: dict[str, str] = {}
        self.seconds = 0.0

    def add(self, *, backwards: bool) -> None:
        """One more round: every program once, in turn."""
        begin, case = time.perf_counter(), self.prepared.case
        turns = [(program.name, program, case.epochs) for program in self.programs]
        if case.epochs > 1:
            turns.append((ONE_EPOCH, self.programs[0], 1))
        # torch.compile takes tens of seconds once a run, which is most of so short a one: see `--compiled`.
        if self.compiled and case.dtype == "bfloat16":
            turns.append((COMPILED, self.programs[0], case.epochs))
        for name, program, epochs in reversed(turns) if backwards else turns:
            if name in self.left_out:
                continue
            try:
                result = run_program(program, self.prepared, epochs=epochs, compiled=name == COMPILED)
            except Missing as error:
                self.left_out[name] = str(error)
                _say(f"  {name}: {error}")
                continue
            self.found[name].append(result)
            speed = case.samples * epochs / result["seconds"]
            _say(f"  {name}: {result['seconds']:.1f} s, {speed:.3g} samples/s, {result['peak_bytes'] / 2**30:.2f} GiB")
        self._check()
        tokens = self.found[OURS][-1]["figures"]["tokens_computed"] // case.steps
        self.rates.append(matmul_rate(self.prepared, max(tokens, 64)))
        self.seconds = time.perf_counter() - begin

    def _check(self) -> None:
        """See that all did the same maths; a peer beyond the first that did not is left out, and the table says so."""
        case = self.prepared.case
        beyond = {program.name for program in self.programs[2:]}
        for name, results in list(self.found.items()):
            steps = len(results[-1]["losses"])
            try:
                check_losses(case, name, self.found[OURS][-1]["losses"][:steps], results[-1]["losses"])
            except OtherMaths as error:
                if name not in beyond:
                    raise
                self.left_out[name] = str(error).partition("\n")[0]
                del self.found[name]
                _say(f"  {self.left_out[name]}")

    def rows(self) -> list[dict[str, Any]]:
        """Of all epochs, and where a case has several also of one alone."""
        case, size = self.prepared.case, self.prepared.size
        whole = {name: results for name, results in self.found.items() if name != ONE_EPOCH}
        rows = case_rows(case, size, epochs=case.epochs, found=whole, rates=self.rates)
        if case.epochs > 1:
            once = {name: results for name, results in whole.items() if name != COMPILED}
            once[OURS] = self.found[ONE_EPOCH]
            rows += case_rows(case, size, epochs=1, found=once, rates=self.rates)
        return rows


def measure(options: argparse.Namespace, cases: list[Case], programs: list[Program]) -> Iterator[dict[str, Any]]:
    """All rounds of all cases; after the first, only rounds that still fit in `options.minutes`.

    Yields:
        After each round what was found so far, for it takes long, and may be broken off.
    """
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        runs = []
        for case in cases:
            prepared = prepare(case, size=options.size, device=options.device, folder=Path(temporary))
            runs.append(Rounds(prepared, programs, compiled=options.compiled))
        for number in range(options.rounds):
            for run in runs:
                if number and time.monotonic() + run.seconds > end:
                    continue
                _say(f"{run.prepared.case.name}, round {number + 1}")
                run.add(backwards=bool(number % 2))
                yield _so_far([run for run in runs if run.found])


def _so_far(runs: list[Rounds]) -> dict[str, Any]:
    left_out = {f"{run.prepared.case.name}, {name}": why for run in runs for name, why in run.left_out.items()}
    return {"rows": [row for run in runs for row in run.rows()], "left_out": left_out}


def _programs(options: argparse.Namespace) -> list[Program]:
    programs = [Program(name=OURS, worker="mmpeft", python=sys.executable)]
    trl = options.trl or (sys.executable if importlib.util.find_spec("trl") else None)
    if options.plain:
        programs.append(Program(name="transformers", worker="plain", python=sys.executable))
    if trl and (options.trl or not options.tiny):
        programs.append(Program(name="trl", worker="trl", python=trl, package="trl"))
    elif not options.tiny:
        _say("TRL is left out: it is not installed here; `pip install -e '.[bench]'`, or give --trl PYTHON")
    if options.swift:
        programs.append(Program(name="ms-swift", worker="swift", python=options.swift, package="ms_swift"))
    if options.llama_factory:
        python = options.llama_factory
        programs.append(Program(name="llama-factory", worker="llama_factory", python=python, package="llamafactory"))
    return programs


def _cases(options: argparse.Namespace) -> list[Case]:
    names = options.case or (QUICK if options.quick else CASES)
    cases = [CASES[name] for name in names]
    if options.device == "cuda":
        # Enough work that a step is not all launches: a GPU is fast, and its clock has to settle.
        cases = [
            dataclasses.replace(case, samples=16 * case.samples, batch=4 * case.batch)
            for case in cases
            if case.dtype == "bfloat16"
        ]
    if options.tiny:
        cases = [dataclasses.replace(case, epochs=min(case.epochs, 2)) for case in cases]
    return cases


def _command(options: argparse.Namespace) -> str:
    """What was called, without the places of this machine."""
    cases = [f"--case {name}" for name in options.case or ()]
    flags = [f"--{name}" for name in ("quick", "tiny", "plain", "compiled") if getattr(options, name)]
    gpu = [f"--device {options.device}", f"--size {options.size}"] if options.device != "cpu" else []
    words = [*cases, *flags, *gpu, f"--rounds {options.rounds}", f"--minutes {options.minutes:g}"]
    given = " ".join(words)
    return f'make bench-peers BENCH="{given}"' if options.swift else f"python benchmarks/training_speed.py {given}"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append", help="may be given several times")
    parser.add_argument("--quick", action="store_true", help="four cases, each finding once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=8, help="a further round begins only if it fits")
    parser.add_argument(
        "--trl", type=os.path.abspath, metavar="PYTHON", help="of an environment with TRL; default: this one"
    )
    parser.add_argument("--swift", type=os.path.abspath, metavar="PYTHON", help="of an environment with ms-swift")
    parser.add_argument("--llama-factory", type=os.path.abspath, metavar="PYTHON", help="of one with LLaMA-Factory")
    parser.add_argument("--plain", action="store_true", help="also transformers' own Trainer")
    parser.add_argument("--compiled", action="store_true", help="in bfloat16 also mmpeft with compute.compile: true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, help="default: 135m on CPU, 0.5b on a GPU")
    parser.add_argument("--tiny", action="store_true", help="a smoke test: tiny models, against transformers' Trainer")
    parser.add_argument("--results", type=Path, help="the JSON file; the table goes beside it")
    options = parser.parse_args()
    options.size = options.size or ("tiny" if options.tiny else "0.5b" if options.device == "cuda" else "135m")
    options.plain = options.plain or options.tiny
    if options.results is None and not (options.case or options.quick or options.tiny):
        options.results = RESULTS if options.device == "cpu" else RESULTS.with_stem(f"{RESULTS.stem}_{options.device}")
    return options


def main() -> None:
    """Measure, compare, write, print."""
    options = _options()
    programs = _programs(options)
    facts = {
        "command": _command(options),
        "hardware": hardware(torch.device(options.device)),
        "versions": versions(),
        "programs": {program.name: program.version for program in programs[1:]},
        "size": options.size,
    }
    if options.results is not None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
    page = ""
    for found in measure(options, _cases(options), programs):
        page = markdown(found["rows"], {**facts, **found})
        if options.results is not None:
            options.results.write_text(json.dumps({**facts, **found}, indent=2) + "\n", encoding="utf-8")
            options.results.with_suffix(".md").write_text(page, encoding="utf-8")
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
