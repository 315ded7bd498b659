"""`mmpeft export gguf SOURCE OUT`."""

from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer
from rich.text import Text

from mmpeft.cli.answers import DeviceOption, TrustOption
from mmpeft.cli.export import (
    BaseOption,
    DataOption,
    DropOption,
    OutArgument,
    ParityOption,
    RootOption,
    SamplesOption,
    SkipOption,
    SourceArgument,
    say,
)
from mmpeft.cli.output import JsonOption, err
from mmpeft.core import units
from mmpeft.core.lazy import LazyModule

exporting = LazyModule("mmpeft.pipeline.export_gguf")
gates = LazyModule("mmpeft.pipeline.export_gate")


class OutType(StrEnum):
    """How matrices are written; the same names as `mmpeft.export.gguf_file.OutType`."""

    Q8_0 = "q8_0"
    F16 = "f16"
    BF16 = "bf16"


def gguf(
    source: SourceArgument,
    out: OutArgument,
    base: BaseOption = None,
    outtype: Annotated[OutType, typer.Option(help="How the language model's matrices are written.")] = OutType.Q8_0,
    lora: Annotated[bool, typer.Option("--lora", help="Write the LoRA apart instead of a merged model.")] = False,
    skip: SkipOption = None,
    data: DataOption = None,
    media_root: RootOption = None,
    samples: SamplesOption = 64,
    min_agreement: Annotated[
        float,
        typer.Option(min=0, max=1, help="Least share of held-out questions with the same answer, and of tokens."),
    ] = 0.95,
    max_drop: DropOption = 0.01,
    parity: ParityOption = True,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """The language model, and vision tower with projector, for llama.cpp, Ollama and LM Studio."""
    done = exporting.export_gguf(
        source,
        out,
        base=base,
        outtype=outtype.value,
        lora=lora,
        skip=tuple(skip or ()),
        data=data,
        media_root=media_root,
        samples=samples,
        threshold=gates.Threshold(top1=min_agreement, drop=max_drop, answers=min_agreement),
        compare=parity,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    for note in done.result.notes:
        err.print(Text(f"note: {note}"), soft_wrap=True)
    said = " and ".join(f"{name} ({units.size(size)})" for name, size in done.result.files.items())
    # Without llama.cpp there is nothing to fail.
    compared = "agreement" in done.parity
    say(done, asdict(done.result), said, as_json=as_json, asked=parity and compared)
