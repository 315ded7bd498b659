"""What every command shares: where output goes, `--json`, and how errors become exit statuses."""

import json
import os
import sys
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_DATA, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
"""Whether this is the process that speaks: torch's launchers number those of a run in RANK."""

ONE_OF_SEVERAL = "RANK" in os.environ
"""Whether a launcher has started this process among others."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]

err = Console(stderr=True, highlight=False)
"""For progress, logs and errors."""


def human(as_json: bool) -> Console:
    """Where text for people goes: stdout, or stderr when stdout carries the JSON object; the first process's only."""
    if as_json:
        _keep_stdout_for_json()
    return Console(highlight=False, stderr=as_json, quiet=not FIRST_PROCESS)


def print_json(value: Any) -> None:
    """One JSON object on stdout; of several processes, by the first."""
    if FIRST_PROCESS:
        print(json.dumps(value, ensure_ascii=False, default=str), file=_kept[0] if _kept else sys.stdout, flush=True)


_kept: list[TextIO] = []
"""The stdout that carries the JSON object, where all else that is printed goes elsewhere."""


def _keep_stdout_for_json() -> None:
    """Let all else that is printed go to stderr: DeepSpeed's compiler, for one, prints to stdout."""
    if _kept or sys.stdout is not sys.__stdout__ or sys.stdout is None or sys.stdout.fileno() != 1:
        return
    sys.stdout.flush()
    _kept.append(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
