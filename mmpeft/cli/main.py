"""The `mmpeft` program: mounts the commands, and turns errors into messages and exit statuses."""

import logging
import os
import sys
import warnings
from typing import Annotated

import typer
from rich.text import Text

from mmpeft import __version__
from mmpeft.cli import answers, data, doctor, families, plan, quickstart, recipes, run
from mmpeft.cli.output import EXIT_DATA, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, err
from mmpeft.core.errors import DataError, MMPeftError, RecipeError, RunInterrupted

app = typer.Typer(
    name="mmpeft",
    help="Fine-tune multimodal models with adapters, in stages.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.quickstart)
app.command("run")(run.run)
app.command("plan")(plan.plan)
app.command("evaluate")(answers.evaluate)
app.command("generate")(answers.generate)
app.command("doctor")(doctor.doctor)
app.command("families")(families.families)
app.add_typer(data.app, name="data", help="Look at data before training on it.")
app.add_typer(recipes.app, name="recipes", help="The recipes that come with mmpeft.")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mmpeft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log, and tracebacks of errors.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("mmpeft").setLevel(logging.INFO if verbose else logging.WARNING)
    if not verbose:
        # Read by the libraries when they are imported, which the command that follows does.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def main() -> None:
    """Run the program and exit: 0 done, 1 failed, 2 wrong use or bad recipe, 3 bad data, 130 interrupted."""
    verbose = "-v" in sys.argv[1:] or "--verbose" in sys.argv[1:]
    try:
        app()
    except MMPeftError as error:
        if verbose:
            err.print_exception()
        # In one piece, so that those of processes side by side don't mix.
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise SystemExit(_status(error)) from None
    except SystemExit as exit_:
        # typer turns Ctrl-C into a silent exit.
        if exit_.code == EXIT_INTERRUPTED:
            err.print("stopped; what had been written is kept: the same command goes on from there")
        raise


def _status(error: MMPeftError) -> int:
    if isinstance(error, RunInterrupted):
        return EXIT_INTERRUPTED
    if isinstance(error, RecipeError):
        return EXIT_USAGE
    return EXIT_DATA if isinstance(error, DataError) else EXIT_FAILED
