"""`mmpeft export gguf SOURCE OUT`."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mmpeft.cli.output import JsonOption, err, human, print_json
from mmpeft.core import units
from mmpeft.core.lazy import LazyModule

exporting = LazyModule("mmpeft.export.gguf")


class OutType(StrEnum):
    """How matrices are written; the same names as `mmpeft.export.gguf_file.OutType`."""

    Q8_0 = "q8_0"
    F16 = "f16"
    BF16 = "bf16"


def gguf(
    source: Annotated[str, typer.Argument(help="Adapter or model: a directory or hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write: new, empty or an earlier export.")],
    base: Annotated[str | None, typer.Option(help="The adapter's base; default: the one that it names.")] = None,
    outtype: Annotated[OutType, typer.Option(help="How the language model's matrices are written.")] = OutType.Q8_0,
    lora: Annotated[bool, typer.Option("--lora", help="Write the LoRA apart instead of a merged model.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let code that comes with the base run.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model for llama.cpp, Ollama and LM Studio: the language model, and vision tower with projector."""
    done = exporting.export_gguf(
        source, output, base=base, outtype=outtype.value, lora=lora, trust_remote_code=trust_remote_code
    )
    for note in done.notes:
        err.print(Text(f"note: {note}"), soft_wrap=True)
    if as_json:
        print_json(asdict(done))
        return
    files = " and ".join(f"{name} ({units.size(size)})" for name, size in done.files.items())
    human(as_json).print(
        f"wrote {files} to {done.output}, from {units.size(done.before)}", markup=False, soft_wrap=True
    )
