"""`mmpeft export int8 SOURCE OUT`; other formats are mounted beside it."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmpeft.cli.answers import DeviceOption, TrustOption
from mmpeft.cli.output import EXIT_FAILED, JsonOption, human, print_json
from mmpeft.core import units
from mmpeft.core.lazy import LazyModule

exporting = LazyModule("mmpeft.pipeline.export_int8")
bitsandbytes = LazyModule("mmpeft.pipeline.export_bnb")
gates = LazyModule("mmpeft.pipeline.export_gate")
settings = LazyModule("mmpeft.export.int8")

app = typer.Typer(no_args_is_help=True)

SourceArgument = Annotated[str, typer.Argument(help="Adapter or model: its directory or hub id.")]
OutArgument = Annotated[Path, typer.Argument(help="New or empty directory, or an earlier export, to write.")]
BaseOption = Annotated[str | None, typer.Option(help="The adapter's base; default: the one that it names.")]
DataOption = Annotated[
    Path | None, typer.Option(help="Held-out data to compare on; default: that of the run that trained the adapter.")
]
RootOption = Annotated[Path | None, typer.Option(help="Folder of its media; default: the file's own.")]
SamplesOption = Annotated[int, typer.Option(min=1, help="Samples whose answers are compared token by token.")]
ParityOption = Annotated[bool, typer.Option(help="Compare with the source; what was not compared is not pushed.")]
SkipOption = Annotated[
    list[str] | None, typer.Option(help="Layer to leave, or re:PATTERN; repeatable.", metavar="LAYER")
]
AgreementOption = Annotated[
    float, typer.Option(min=0, max=1, help="Least share of held-out tokens with the same most likely one.")
]
DropOption = Annotated[float, typer.Option(min=0, max=1, help="Most that a metric of held-out answers may fall.")]


class Activations(StrEnum):
    """How activations are scaled."""

    dynamic = "dynamic"
    static = "static"


class BnbKind(StrEnum):
    """What bitsandbytes holds."""

    int8 = "int8"
    nf4 = "nf4"


@app.callback()
def export() -> None:
    """Write models for other programs; each is compared with what it was made from."""


@app.command()
def int8(
    source: SourceArgument,
    out: OutArgument,
    base: BaseOption = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Part to quantize beside the language model; repeatable.", metavar="PART")
    ] = None,
    skip: SkipOption = None,
    auto_skip: Annotated[bool, typer.Option("--auto-skip", help="Leave as few layers as will do in 16 bits.")] = False,
    activations: Annotated[Activations, typer.Option(help="Scaled a token while it runs, or by one number.")] = (
        Activations.dynamic
    ),
    smooth: Annotated[float, typer.Option(min=0, max=1, help="SmoothQuant's strength; 0.5 is usual, 0 none.")] = 0.0,
    data: DataOption = None,
    media_root: RootOption = None,
    samples: SamplesOption = 64,
    min_agreement: AgreementOption = 0.95,
    max_drop: DropOption = 0.01,
    parity: ParityOption = True,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """int8 weights and activations (compressed-tensors) for transformers, vLLM and vllm-ascend."""
    console = human(as_json)
    done = exporting.export_int8(
        source,
        out,
        base=base,
        settings=settings.Int8Settings(
            include=tuple(include or ()), skip=tuple(skip or ()), activations=activations.value, smooth=smooth
        ),
        auto_skip=auto_skip,
        data=data,
        media_root=media_root,
        samples=samples,
        threshold=gates.Threshold(top1=min_agreement, drop=max_drop),
        compare=parity,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    result = done.result
    said = f"{len(result.quantized)} linear layers in int8, {len(result.left)} left"
    if done.left_by_itself and not as_json:
        console.print(f"left in 16 bits: {', '.join(done.left_by_itself)}", markup=False, soft_wrap=True)
    say(done, {**asdict(result), "left_by_itself": done.left_by_itself}, said, as_json=as_json, asked=parity)


@app.command()
def bnb(
    source: SourceArgument,
    out: OutArgument,
    base: BaseOption = None,
    kind: Annotated[BnbKind, typer.Option(help="LLM.int8, or 4 bits.")] = BnbKind.int8,
    skip: SkipOption = None,
    data: DataOption = None,
    media_root: RootOption = None,
    samples: SamplesOption = 64,
    min_agreement: AgreementOption = 0.95,
    max_drop: DropOption = 0.01,
    parity: ParityOption = True,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """LLM.int8 or NF4 weights (bitsandbytes), for transformers on one device."""
    human(as_json)  # Before libraries are imported that print.
    done = bitsandbytes.export_bnb(
        source,
        out,
        kind=kind.value,
        base=base,
        skip=tuple(skip or ()),
        data=data,
        media_root=media_root,
        samples=samples,
        threshold=gates.Threshold(top1=min_agreement, drop=max_drop),
        compare=parity,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    said = f"{len(done.result.quantized)} linear layers in {kind.value}"
    say(done, asdict(done.result), said, as_json=as_json, asked=parity)


def say(done: Any, facts: Mapping[str, Any], said: str, *, as_json: bool, asked: bool) -> None:
    """Say what an export has made, and end with status 1 where it was to pass the gate and did not.

    Args:
        done: the outcome.
        facts: of the result, for JSON.
        said: what it consists of, in words.
        asked: whether a comparison was asked for.
    """
    result = done.result
    if as_json:
        print_json({**facts, "parity": done.parity})
    else:
        console = human(as_json)
        console.print(
            f"wrote {result.output}: {said}; {units.size(result.before)} became {units.size(result.bytes)}",
            markup=False,
            soft_wrap=True,
        )
        _show_parity(console, done.parity)
    if asked and not done.parity["passed"]:
        raise typer.Exit(EXIT_FAILED)


def _show_parity(console: Console, parity: Mapping[str, Any]) -> None:
    """What the gate found, for people."""
    if agreement := parity.get("agreement"):
        metrics = parity["metrics"]
        scores = ", ".join(
            f"{name} {metrics['source'][name]:.3f} -> {metrics['export'][name]:.3f}" for name in metrics["source"]
        )
        # Neither is there where no token was compared, or none of the export's is a number.
        top1, kl = (math.nan if agreement[name] is None else agreement[name] for name in ("top1", "kl"))
        console.print(
            f"on {parity['data']}: {top1:.1%} of {agreement['tokens']} tokens the same, KL {kl:.2g}; {scores}",
            markup=False,
            soft_wrap=True,
        )
    verdict = "passed" if parity["passed"] else f"not passed: {parity['why']}"
    console.print(f"parity {verdict}", markup=False, soft_wrap=True)
