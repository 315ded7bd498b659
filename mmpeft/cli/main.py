"""The `mmpeft` program: mounts the commands, and turns errors into messages and exit statuses."""

import atexit
import logging
import os
import sys
import time
import traceback
import warnings
from typing import Annotated

import typer
from rich.text import Text

from mmpeft import __version__
from mmpeft.cli import (
    adapters,
    answers,
    data,
    doctor,
    export,
    export_gguf,
    export_onnx,
    families,
    hub,
    merge,
    plan,
    quickstart,
    recipes,
    run,
)
from mmpeft.cli.output import (
    EXIT_DATA,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USAGE,
    FIRST_PROCESS,
    ONE_OF_SEVERAL,
    err,
)
from mmpeft.core.errors import DataError, MMPeftError, RecipeError, RunAgain, RunInterrupted

OTHERS_WAIT_SECONDS = 2

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
app.command("merge")(merge.merge)
app.command("compose")(merge.compose)
app.command("push")(hub.push)
app.command("card")(hub.card)
app.command("reproduce")(hub.reproduce)
app.command("doctor")(doctor.doctor)
app.command("families")(families.families)
app.add_typer(data.app, name="data", help="Look at data before training on it.")
app.add_typer(adapters.app, name="adapters", help="Adapters listed, compared, averaged, combined and converted.")
app.add_typer(export.app, name="export", help="Write models for other programs, compared with their source.")
export.app.command("gguf")(export_gguf.gguf)
export.app.command("onnx")(export_onnx.onnx)
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
    # Which of its kernels are not here; PEFT imports it where it is installed.
    logging.getLogger("bitsandbytes").setLevel(logging.INFO if verbose else logging.ERROR)
    if not verbose:
        # Read by the libraries when they are imported, which the command that follows does.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch\.distributed)\.")
        # Nothing here changes a layer's output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        logging.getLogger("accelerate.accelerator").addFilter(_said_of_accumulation)


def _said_of_accumulation(record: logging.LogRecord) -> bool:
    """Leaves out that DeepSpeed knows how many micro-batches an update has, and accelerate's own plugin does not."""
    return "Gradient accumulation steps mismatch" not in record.getMessage()


def main() -> None:
    """Run the program and exit: 0 done, 1 failed, 2 wrong use or bad recipe, 3 bad data, 130 interrupted.

    Of processes that a launcher has started also 75: start them again, with what was written down to need less memory.
    """
    status: list[int] = []
    if ONE_OF_SEVERAL:
        # What is registered first is called last: a tracker's farewell, say, comes before.
        atexit.register(_end, status)
    try:
        _run()
    except SystemExit as exit_:
        code = exit_.code or EXIT_OK
        if isinstance(code, int):
            if code not in (EXIT_OK, EXIT_INTERRUPTED):
                _leave_others(code)
            status.append(code)
        raise
    except Exception:
        if ONE_OF_SEVERAL:
            traceback.print_exc()
            _leave_others(EXIT_FAILED)
        raise


def run_with(arguments: list[str]) -> None:
    """`main` with these arguments, for programs that mount a command of ours."""
    sys.argv = ["mmpeft", *arguments]
    main()


def _leave_others(status: int) -> None:
    """End one process of several that has failed, without the farewells in which it might wait for the others."""
    if ONE_OF_SEVERAL:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end(status: list[int]) -> None:
    """End one process of several before the interpreter takes itself apart; no status: leave it to the interpreter.

    A thread in which gloo still lets go of a tensor would ask for the interpreter's lock, be ended by it in the middle
    of C++, and take the process down with SIGABRT: a run that is done would count as failed.
    """
    if status:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status[0])


def _run() -> None:
    verbose = "-v" in sys.argv[1:] or "--verbose" in sys.argv[1:]
    try:
        app()
    except MMPeftError as error:
        if not FIRST_PROCESS and isinstance(error, RunInterrupted):
            raise SystemExit(_status(error)) from None
        if not FIRST_PROCESS:
            # What the first process says as well need not stand there twice: its end is this one's.
            time.sleep(OTHERS_WAIT_SECONDS)
        if verbose:
            err.print_exception()
        # In one piece, so that those of processes side by side don't mix.
        err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        raise SystemExit(_status(error)) from None
    except RuntimeError as error:
        if not _left_alone(error):
            raise
        # Its end would be taken for the first, and say nothing of what has happened.
        time.sleep(OTHERS_WAIT_SECONDS)
        err.print(f"process {os.environ['RANK']}: stopped, for another process has gone; see what that one says")
        raise SystemExit(EXIT_FAILED) from None
    except SystemExit as exit_:
        # typer turns Ctrl-C into a silent exit.
        if exit_.code == EXIT_INTERRUPTED and FIRST_PROCESS:
            err.print("stopped; the same command goes on from what had been written, or begins anew")
        if not exit_.code:
            _leave_together()
        raise


def _left_alone(error: RuntimeError) -> bool:
    """Whether a process found out by a broken connection that another has failed."""
    text = str(error)
    return ONE_OF_SEVERAL and any(said in text for said in _BROKEN)


_BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What gloo says of a process that has gone; NCCL and HCCL wait for one until the launcher ends them."""


def _leave_together() -> None:
    """Take leave of the other processes, which else may find a connection closed while they still use it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _status(error: MMPeftError) -> int:
    if isinstance(error, RunInterrupted):
        return EXIT_INTERRUPTED
    if isinstance(error, RunAgain):
        return RunAgain.STATUS
    if isinstance(error, RecipeError):
        return EXIT_USAGE
    return EXIT_DATA if isinstance(error, DataError) else EXIT_FAILED
