"""`mmpeft run RECIPE`."""

from pathlib import Path
from typing import Annotated

import typer

import mmpeft
from mmpeft.cli.output import JsonOption, human, print_json

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
    console = human(as_json)
    loaded = mmpeft.Recipe.from_yaml(recipe, tuple(set_ or ()))
    result = mmpeft.run(loaded, resume=resume, until=stage, console=console)
    if as_json:
        print_json(
            {
                "output": result.output,
                "result": result.result,
                "report": result.report,
                "stages": list(result.stages),
                "scores": result.scores,
            }
        )
    else:
        console.print(f"result: {result.result}\nreport: {result.report}", soft_wrap=True)
