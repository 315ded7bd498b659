"""`mmpeft push`, `mmpeft card` and `mmpeft reproduce`: what a run made, shown to others and made again."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mmpeft.cli.output import EXIT_FAILED, JsonOption, err, human, print_json
from mmpeft.cli.run import SetOption
from mmpeft.core import units
from mmpeft.core.lazy import LazyModule

publishing = LazyModule("mmpeft.pipeline.publish")
reproducing = LazyModule("mmpeft.pipeline.reproduce")


def push(
    path: Annotated[Path, typer.Argument(help="A run, an adapter, a model or an export.")],
    repo: Annotated[str, typer.Argument(help="Where to, as OWNER/NAME.", metavar="OWNER/NAME")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see a repository that is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be sent.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(
            help="The base's name on the Hub, of an adapter that was trained on a directory; pushed first where "
            "nothing is there yet.",
            metavar="OWNER/NAME",
        ),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="As the Hub calls it; default: that of the base's card.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave out files that match; repeatable.", metavar="PATTERN")
    ] = None,
    card: Annotated[Path | None, typer.Option(help="A README.md of your own.", exists=True, dir_okay=False)] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Push an export that was not compared with its source.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Publish an adapter, a model or an export on the Hub, in one commit.

    Nothing is sent that holds a secret or a path of this machine. A push that broke off goes on with the same command.
    """
    console = human(as_json)
    options: dict[str, Any] = {
        "base_model": base_model,
        "exclude": tuple(exclude or ()),
        "card": card,
        "unverified": unverified,
    }
    made = publishing.prepare(path, repo, license=license_, **options)
    if not made.license and not dry_run and not as_json and sys.stdin.isatty():
        given = typer.prompt("Licence (as the Hub calls it, empty: none is named)", default="", show_default=False)
        made = publishing.prepare(path, repo, license=given or None, **options)
    if not as_json:
        console.print(_table(made))
    for note in made.notes:
        err.print(f"note: {note}", soft_wrap=True, markup=False)
    pushed = None if dry_run else publishing.push_prepared(made, private=not public)
    if as_json:
        print_json({**made.to_dict(), "pushed": vars(pushed) if pushed else None})
    elif pushed is None:
        console.print(f"nothing was sent; a new repository would be {'public' if public else 'private'}")
    else:
        for name in pushed.removed:
            console.print(f"removed: {name} (of an earlier push)", markup=False)
        seen = "private" if pushed.private else "public"
        console.print(f"{pushed.url} ({seen}), commit {pushed.commit[:12]}", soft_wrap=True)


def _table(made: Any) -> Table:
    table = Table(title=f"{made.kind} for {made.repo}", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    table.add_column("")
    found = made.to_dict()
    for row in found["files"]:
        table.add_row(row["name"], units.size(row["bytes"]), "written for the Hub" if row["rewritten"] else "")
    table.add_section()
    table.add_row("all", units.size(found["bytes"]), "")
    for name, reason in made.left_out.items():
        table.add_row(f"[dim]{name}", "", f"[dim]left out: {reason}")
    return table


def card(
    path: Annotated[Path, typer.Argument(help="A run, an adapter, a model or an export.")],
    repo: Annotated[str | None, typer.Option(help="Where it would be pushed.", metavar="OWNER/NAME")] = None,
    base_model: Annotated[str | None, typer.Option(help="The base's name on the Hub.", metavar="OWNER/NAME")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the card that `mmpeft push` would write."""
    text = publishing.preview(path, repo, base_model=base_model)
    if as_json:
        print_json({"card": text})
    else:
        human(as_json).print(text, markup=False, soft_wrap=True, end="")


def reproduce(
    adapter: Annotated[str, typer.Argument(help="Adapter directory or hub id.")],
    output: Annotated[Path | None, typer.Option(help="Of the new run; default: runs/reproduced-NAME.")] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter again from its own record, and compare scores and weights.

    Status 1 where they differ although machine and versions are those of the first time.
    """
    console = human(as_json)
    found = reproducing.reproduce(adapter, output=output, overrides=tuple(set_ or ()), console=console)
    for note in found.unchecked:
        err.print(f"note: {note}", soft_wrap=True, markup=False)
    if as_json:
        print_json(found.to_dict())
    else:
        for name, (then, now) in found.scores.items():
            console.print(f"{name}: {then:.4f} then, {now:.4f} now")
        console.print(
            f"weights: {found.tensors - found.differing} of {found.tensors} tensors have the same bits"
            + (f"; largest difference {found.largest_difference:.3g} in {found.tensor}" if found.differing else "")
        )
        for difference in found.elsewhere:
            console.print(f"not the same: {difference}", markup=False)
    if not found.identical and not found.elsewhere:
        err.print("it is not the same, although machine and versions are")
        raise typer.Exit(EXIT_FAILED)
