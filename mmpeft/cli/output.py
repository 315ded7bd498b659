"""What every command shares: where output goes, `--json`, and how errors become exit statuses."""

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_DATA, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

FIRST_PROCESS = os.environ.get("RANK", "0") == "0"
"""Whether this is the process that speaks: torch's launchers number those of a run in RANK."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]

err = Console(stderr=True, highlight=False)
"""For progress, logs and errors."""


def human(as_json: bool) -> Console:
    """Where text for people goes: stdout, or stderr when stdout carries the JSON object; the first process's only."""
    return Console(highlight=False, stderr=as_json, quiet=not FIRST_PROCESS)


def print_json(value: Any) -> None:
    """One JSON object on stdout; of several processes, by the first."""
    if FIRST_PROCESS:
        sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
