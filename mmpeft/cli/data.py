"""`mmpeft data check PATH` and `mmpeft data show PATH`."""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mmpeft.cli.output import EXIT_DATA, JsonOption, err, human, print_json
from mmpeft.core.lazy import LazyModule

checks = LazyModule("mmpeft.data.check")

app = typer.Typer(no_args_is_help=True)

PathArgument = Annotated[Path, typer.Argument(help="Data file: LLaVA JSON or JSONL.")]
RootOption = Annotated[Path | None, typer.Option(help="Folder of the pictures; default: the file's own.")]


@app.command()
def check(path: PathArgument, media_root: RootOption = None, as_json: JsonOption = False) -> None:
    """Check every row and decode every picture; exit status 3 if anything cannot be used."""
    with err.status(f"checking {path}"):
        report = checks.check_data(path, media_root)
    if as_json:
        print_json({"file": str(path), **asdict(report)})
    else:
        _show_report(human(as_json), report)
    if report.errors:
        raise typer.Exit(EXIT_DATA)


def _show_report(console: Console, report: Any) -> None:
    kinds = ", ".join(f"{name or 'no kind'}: {count}" for name, count in report.kinds.items())
    console.print(
        f"{report.samples} samples ({kinds or 'none'}), {report.pictures} pictures, {report.turns} turns",
        markup=False,
    )
    for style, name, messages in (("red", "error", report.errors), ("yellow", "warning", report.warnings)):
        for message in messages:
            console.print(Text.assemble((f"{name}: ", style), message), soft_wrap=True)
    console.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings")


@app.command()
def show(
    path: PathArgument,
    media_root: RootOption = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many samples.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show the first samples as turns, with the names and sizes of their pictures."""
    samples = list(islice(checks.describe_samples(path, media_root), count))
    if as_json:
        print_json({"file": str(path), "samples": samples})
        return
    console = human(as_json)
    for sample in samples:
        kind = f"  kind {sample['kind']!r}" if sample["kind"] else ""
        heading = f"sample {sample['index']}  id {sample['id']!r}  line {sample['line']}{kind}"
        console.print(Text(heading, style="bold"), soft_wrap=True)
        for picture in sample["images"]:
            size = f"{picture['width']} x {picture['height']}" if "width" in picture else picture["error"]
            console.print(Text(f"  picture    {picture['name']}  {size}"), soft_wrap=True)
        for turn in sample["turns"]:
            label = Text(f"  {turn['role']:<10} ", style="cyan")
            console.print(label + Text(turn["text"].replace("\n", "\n" + " " * 13)), soft_wrap=True)
