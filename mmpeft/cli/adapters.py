"""`mmpeft adapters list | diff | average | combine | convert`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from mmpeft.cli.answers import TrustOption
from mmpeft.cli.output import JsonOption, human, print_json
from mmpeft.core.lazy import LazyModule
from mmpeft.core.units import count, rate, size

comparing = LazyModule("mmpeft.export.adapters.comparing")
converting = LazyModule("mmpeft.export.adapters.converting")
joining = LazyModule("mmpeft.export.adapters.joining")
listing = LazyModule("mmpeft.export.adapters.listing")

app = typer.Typer(no_args_is_help=True)

AdaptersArgument = Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Directories of adapters.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="New or empty directory, or an earlier export.")]

SHOWN = 20
"""Rows of a comparison that people are shown, the largest differences; `--json` has all."""


@app.command("list")
def list_adapters(
    folder: Annotated[Path, typer.Argument(help="Where to look, in folders below it too.")] = Path(),
    as_json: JsonOption = False,
) -> None:
    """List the adapters under a folder, with what their files say of them."""
    found = listing.list_adapters(folder)
    if as_json:
        print_json({"adapters": [asdict(entry) for entry in found]})
        return
    console = human(as_json)
    if not found:
        console.print(f"no adapter under {folder.resolve()}", markup=False, soft_wrap=True)
        return
    # Names are there to be copied: they are broken into lines, and never cut.
    table = Table(Column("adapter", overflow="fold"), "base", "trains", "rank", "parameters", "size", "scores")
    for entry in found:
        if entry.problem:
            continue
        scores = " ".join(f"{name} {value:.3f}" for name, value in (entry.metrics or {}).items())
        cells = [str(entry.path), Path(entry.base or "").name, entry.kind, str(entry.rank or "-")]
        table.add_row(*map(Text, [*cells, count(entry.parameters), size(entry.bytes), scores]))
    if table.rows:
        console.print(table)
    for entry in found:
        if entry.problem:
            console.print(Text(entry.problem, style="red"), soft_wrap=True)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="Directory of an adapter.")],
    second: Annotated[Path, typer.Argument(help="Directory of another.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two adapters: configuration, names, shapes, and how far what they add is apart."""
    found = comparing.diff_adapters(first, second)
    if as_json:
        print_json({**asdict(found), "same": found.same})
        return
    console = human(as_json)
    if found.bases[0] != found.bases[1]:
        console.print(f"bases: {found.bases[0]} | {found.bases[1]}", markup=False, soft_wrap=True)
    for key, values in found.config.items():
        console.print(f"{key}: {values[0]} | {values[1]}", markup=False, soft_wrap=True)
    for what, names in (("first", found.only_first), ("second", found.only_second)):
        for name in names:
            console.print(f"only in the {what}: {name}", markup=False, soft_wrap=True)
    for name, shapes in found.shapes.items():
        console.print(f"shapes differ: {name} {shapes[0]} | {shapes[1]}", markup=False, soft_wrap=True)
    if found.same:
        console.print("both do the same")
        return
    _show_distances(console, [*found.lora, *found.whole])


def _show_distances(console: Any, rows: list[Any]) -> None:
    rows = sorted(rows, key=lambda row: -row.difference)
    table = Table(Column("module or tensor", overflow="fold"), "norm of first", "of second", "of difference", "cosine")
    for row in rows[:SHOWN]:
        cosine = "-" if row.cosine is None else f"{row.cosine:.3f}"
        table.add_row(Text(row.name), rate(row.first), rate(row.second), rate(row.difference), cosine)
    if rows:
        console.print(table)
    if len(rows) > SHOWN:
        console.print(f"and {len(rows) - SHOWN} more with smaller differences; --json has all")


@app.command()
def average(
    adapters: AdaptersArgument,
    out: OutOption,
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each adapter, in their order; default: all the same.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the weighted mean of adapters of one base, exactly; ranks of LoRA add up."""
    _done(joining.average_adapters(adapters, out, weights=weight or ()), as_json)


@app.command()
def combine(adapters: AdaptersArgument, out: OutOption, as_json: JsonOption = False) -> None:
    """Write one adapter that does what several do that were trained apart, such as a projector and a LoRA."""
    _done(joining.combine_adapters(adapters, out), as_json)


def _done(output: Path, as_json: bool) -> None:
    if as_json:
        print_json({"output": output})
    else:
        human(as_json).print(f"wrote {output}", markup=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="File or directory of LLaVA, ms-swift, MindSpeed-MM or PEFT.")],
    out: Annotated[Path, typer.Argument(help="New or empty directory, or an earlier export, to write.")],
    base: Annotated[str, typer.Option(help="The model it is for, in transformers' layout: directory or hub id.")],
    lora_alpha: Annotated[
        float | None, typer.Option(help="Of a LoRA that comes without an adapter_config.json.")
    ] = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a plain PEFT adapter of what another program trained; a tensor that does not fit is named."""
    done = converting.convert_adapter(
        source, out, base=base, lora_alpha=lora_alpha, trust_remote_code=trust_remote_code
    )
    if as_json:
        print_json(asdict(done))
        return
    files = " and ".join(file.name for file in done.files)
    what = f"LoRA on {done.lora} modules, {len(done.saved)} modules saved whole"
    human(as_json).print(f"read {files}; wrote {done.output}: {what}", markup=False, soft_wrap=True)
