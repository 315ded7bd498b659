"""`mmpeft recipes list` and `mmpeft recipes copy NAME [DEST]`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from mmpeft.cli.output import JsonOption, human, print_json
from mmpeft.config.shipped import copy_recipe, shipped_recipes

app = typer.Typer(no_args_is_help=True)


@app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with mmpeft."""
    recipes = shipped_recipes()
    if as_json:
        print_json({"recipes": [{"name": recipe.name, "description": recipe.description} for recipe in recipes]})
        return
    table = Table("name", "description")
    for recipe in recipes:
        table.add_row(recipe.name, recipe.description)
    human(as_json).print(table)


@app.command()
def copy(
    name: Annotated[str, typer.Argument(help="A name that `mmpeft recipes list` shows.")],
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="File or folder; default: the current folder.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a recipe to a file of your own, to edit and run."""
    written = copy_recipe(name, destination, force=force)
    if as_json:
        print_json({"recipe": name, "path": written})
    else:
        human(as_json).print(f"wrote {written}; edit it, then: mmpeft run {written}", markup=False, soft_wrap=True)
