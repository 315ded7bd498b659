"""What every command shares: where output goes, `--json`, and how errors become exit statuses."""

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_DATA, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]

err = Console(stderr=True, highlight=False)
"""For progress, logs and errors."""


def human(as_json: bool) -> Console:
    """Where text for people goes: stdout, or stderr when stdout carries the JSON object."""
    return err if as_json else Console(highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
