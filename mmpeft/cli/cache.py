"""`mmpeft data cache RECIPE`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import mmpeft
from mmpeft.cli.output import FIRST_PROCESS, JsonOption, err, human, print_json
from mmpeft.cli.run import SetOption
from mmpeft.core import units
from mmpeft.core.lazy import LazyModule

caching = LazyModule("mmpeft.pipeline.cache")


def cache(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    stage: Annotated[str | None, typer.Option(help="The stage whose towers are run; default: the first.")] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep what frozen towers make of a recipe's media, so that training need not run them.

    What is kept already is not made again, so it can be stopped and started at will.
    """
    loaded = mmpeft.Recipe.from_yaml(recipe, tuple(set_ or ()))
    bars = (TextColumn("keeping features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not FIRST_PROCESS or not err.is_terminal
    with Progress(*bars, console=err, transient=True, disable=quiet) as progress:
        task = progress.add_task("", total=None)
        filled = caching.fill_cache(
            loaded,
            stage=stage,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(asdict(filled))
        return
    console = human(as_json)
    console.print(
        f"{filled.media:,} media of stage {filled.stage}: {filled.written:,} kept now, {filled.present:,} before, "
        f"{units.size(filled.bytes)} in {filled.directory} ({units.duration(filled.seconds)})",
        markup=False,
        soft_wrap=True,
    )
    if filled.refused:
        warning = f"{filled.refused:,} have no room; raise data.cache.limit_bytes, or remove {filled.directory}"
        err.print(Text.assemble(("warning: ", "yellow"), warning), soft_wrap=True)
