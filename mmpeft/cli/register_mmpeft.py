"""`optimum-cli export mmpeft …` is `mmpeft export …`.

The wheel puts this file where optimum-cli looks for commands: optimum/commands/register/ (a namespace of PEP 420).
"""

from argparse import REMAINDER, ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from mmpeft.cli.main import run_with


class MMPeftExportCommand(BaseOptimumCLICommand):
    """Hands its arguments on."""

    COMMAND = CommandInfo(name="mmpeft", help="Write multimodal models and adapters as int8, ONNX or GGUF.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Take all that follows as it is."""
        parser.add_argument("arguments", nargs=REMAINDER, help="those of `mmpeft export`, such as: int8 ADAPTER OUT")

    def run(self) -> None:
        """Run `mmpeft export`; its exit status is that of optimum-cli."""
        run_with(["export", *(self.args.arguments or ["--help"])])


REGISTER_COMMANDS = [(MMPeftExportCommand, ExportCommand)]
