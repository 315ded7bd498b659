"""`mmpeft plan RECIPE`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import mmpeft
from mmpeft.cli.output import JsonOption, human, print_json
from mmpeft.cli.run import SetOption
from mmpeft.core.lazy import LazyModule

pipeline = LazyModule("mmpeft.pipeline.run")


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each stage would train, and for how many steps, without training."""
    stages = pipeline.plan(mmpeft.Recipe.from_yaml(recipe, tuple(set_ or ())))
    if as_json:
        print_json({"stages": stages})
        return
    console = human(as_json)
    for stage in stages:
        batch = stage["batch"]
        samples = "samples as they are read" if stage["samples"] is None else f"{stage['samples']} samples"
        console.print(
            f"[bold]{stage['name']}[/bold]: {samples}, {stage['steps']} steps of {batch['size']} "
            f"({_at_once(batch)}, {batch['processes']} process(es))",
            soft_wrap=True,
        )
        for source in stage.get("sources", ()):
            console.print(
                f"  {source['name']}: {source['shown']} of {source['samples']} samples an epoch, "
                f"weight {source['weight']:g}",
                soft_wrap=True,
                markup=False,
            )
        console.print(_table(stage))


def _at_once(batch: dict[str, Any]) -> str:
    if batch["tokens"] is not None:
        return f"at most {batch['tokens']} tokens at once"
    return f"{batch['micro']} at once, {batch['accumulation']} accumulated"


def _table(stage: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("part")
    table.add_column("state")
    for name in ("parameters", "trainable", "learning rate"):
        table.add_column(name, justify="right")
    for name, part in stage["parts"].items():
        rate = part["learning_rate"]
        table.add_row(
            name,
            part["state"],
            f"{part['parameters']:,}",
            f"{part['trainable']:,}",
            "" if rate is None else f"{rate:g}",
        )
    return table
