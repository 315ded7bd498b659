"""`mmpeft run RECIPE`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

import mmpeft
from mmpeft.cli.output import JsonOption, human, print_json
from mmpeft.core.lazy import LazyModule

# It imports torch, which most commands do without.
launching = LazyModule("mmpeft.pipeline.launch")

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe; repeatable."),
]


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    stage: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    set_: SetOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Go on from the last checkpoint of a stage that was stopped."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Train all stages of a recipe, evaluate, and write adapter and report.

    What has not changed since the last run is not done again.
    """
    loaded = mmpeft.Recipe.from_yaml(recipe, tuple(set_ or ()))
    if processes := launching.processes_to_start(loaded):
        raise typer.Exit(launching.launch(sys.argv[1:], processes))
    if launching.launched():
        launching.end_with_launcher()
    console = human(as_json)
    result = mmpeft.run(loaded, resume=resume, until=stage, console=console)
    if as_json:
        print_json(
            {
                "output": result.output,
                "result": result.result,
                "report": result.report,
                "stages": list(result.stages),
                "scores": result.scores,
                "published": result.published,
            }
        )
    else:
        console.print(f"result: {result.result}\nreport: {result.report}", soft_wrap=True)
        if result.published:
            console.print(f"pushed: {result.published}", soft_wrap=True)
