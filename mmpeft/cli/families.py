"""`mmpeft families`."""

from collections import Counter
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from mmpeft.cli.output import EXIT_USAGE, JsonOption, err, human, print_json
from mmpeft.config.names import did_you_mean
from mmpeft.core.lazy import LazyModule

catalogue = LazyModule("mmpeft.families.catalogue")

MARKS = {"stated": "s", "get_encoder": "e", "get_decoder": "d", "name": "n"}

COLOURS = {"first class": "green", "generic": "cyan", "not supported": "red"}


def families(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TYPE]...", help="Model types to show in full; default: all, in short."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show every model type with its parts, what it takes beside text, and how far it is supported."""
    entries = catalogue.catalogue()
    known = {entry.model_type: entry for entry in entries}
    for name in names or ():
        if name not in known:
            err.print(f"error: no model type {name!r}{did_you_mean(name, known)}", markup=False, soft_wrap=True)
            raise typer.Exit(EXIT_USAGE)
    chosen = [known[name] for name in names] if names else list(entries)
    version = catalogue.walked_version()
    if as_json:
        print_json({"transformers": version, "families": [_as_json(entry) for entry in chosen]})
    elif names:
        for entry in chosen:
            _print_in_full(entry)
    else:
        _print_table(chosen, version)


def _as_json(entry: Any) -> dict[str, Any]:
    return {
        "model_type": entry.model_type,
        "status": entry.status,
        "family": entry.family,
        "tested": f"{entry.step} step" if entry.step else None,
        "modalities": list(entry.modalities),
        "data": entry.data,
        "parts": {part: {"modules": list(paths), "found": entry.found[part]} for part, paths in entry.parts.items()},
        "note": entry.note,
    }


def _status(entry: Any) -> Text:
    step = f", {entry.step} step" if entry.status == "generic" else ""
    return Text(f"{entry.status}{step}", style=COLOURS[entry.status])


def _print_table(entries: list[Any], version: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model type", no_wrap=True)
    for heading in ("status", "takes", "parts"):
        table.add_column(heading)
    for entry in entries:
        parts = " ".join(f"{part}({MARKS[entry.found[part]]})" for part in entry.parts)
        table.add_row(entry.model_type, _status(entry), ", ".join(entry.modalities), parts)
    console = human(False)
    console.print(table)
    for entry in entries:
        if entry.status == "not supported":
            console.print(f"{entry.model_type}: {entry.note}", markup=False, soft_wrap=True)
    counts = Counter(entry.status for entry in entries)
    console.print(
        f"\n{len(entries)} model types, transformers {version}: {counts['first class']} first class (a file of facts, "
        f"held to the contract tests), {counts['generic']} generic (a training step and the reloaded adapter tested), "
        f"{counts['not supported']} not supported. Parts are (s)tated, or found by get_(e)ncoder, get_(d)ecoder or a "
        "module's (n)ame; `mmpeft families TYPE` shows one in full.",
        markup=False,
        soft_wrap=True,
    )


def _print_in_full(entry: Any) -> None:
    console = human(False)
    console.print(Text.assemble((entry.model_type, "bold"), "  ", _status(entry)))
    for part, paths in entry.parts.items():
        how = {"stated": "stated", "name": "by the module's name"}.get(entry.found[part], f"by {entry.found[part]}()")
        console.print(f"  {part:<10} {', '.join(paths)}  ({how})", markup=False, soft_wrap=True)
    if entry.modalities:
        console.print(f"  takes      {', '.join(entry.modalities)}")
    if entry.note:
        console.print(f"  {entry.note}", markup=False, soft_wrap=True)
