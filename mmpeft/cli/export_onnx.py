"""`mmpeft export onnx SOURCE OUT`."""

from enum import StrEnum
from typing import Annotated

import typer

from mmpeft.cli.export import (
    AgreementOption,
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
from mmpeft.cli.output import JsonOption
from mmpeft.core.lazy import LazyModule

exporting = LazyModule("mmpeft.pipeline.export_onnx")
settings = LazyModule("mmpeft.export.onnx")
gates = LazyModule("mmpeft.pipeline.export_gate")


class Precision(StrEnum):
    """Of weights."""

    int8 = "int8"
    fp16 = "fp16"
    fp32 = "fp32"


def onnx(
    source: SourceArgument,
    out: OutArgument,
    base: BaseOption = None,
    precision: Annotated[Precision, typer.Option(help="Of weights.")] = Precision.int8,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Part to quantize beside the language model (vision).", metavar="PART"),
    ] = None,
    skip: SkipOption = None,
    data: DataOption = None,
    media_root: RootOption = None,
    samples: SamplesOption = 64,
    min_agreement: AgreementOption = 0.95,
    max_drop: DropOption = 0.01,
    parity: ParityOption = True,
    as_json: JsonOption = False,
) -> None:
    """Graphs for ONNX Runtime on a CPU: tower with projector, embedding, decoder with past, head."""
    done = exporting.export_onnx(
        source,
        out,
        base=base,
        settings=settings.OnnxSettings(precision=precision.value, include=tuple(include or ()), skip=tuple(skip or ())),
        data=data,
        media_root=media_root,
        samples=samples,
        threshold=gates.Threshold(top1=min_agreement, drop=max_drop),
        compare=parity,
    )
    result = done.result
    said = f"{len(result.graphs)} graphs in {precision.value}"
    facts = {"output": str(result.output), "graphs": dict(result.graphs)}
    say(done, facts, said, as_json=as_json, asked=parity)
