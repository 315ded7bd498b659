"""`mmpeft merge ADAPTER OUT` and `mmpeft compose ADAPTER OUT`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

import mmpeft
from mmpeft.cli.answers import TrustOption
from mmpeft.cli.output import JsonOption, err, human, print_json
from mmpeft.core.lazy import LazyModule
from mmpeft.core.units import size

composing = LazyModule("mmpeft.export.compose")

AdapterArgument = Annotated[str, typer.Argument(help="Adapter's directory or hub id.")]
OutArgument = Annotated[Path, typer.Argument(help="New or empty directory, or an earlier export, to write.")]
BaseOption = Annotated[str | None, typer.Option(help="The adapter's base; default: the one that it names.")]


def merge(
    adapter: AdapterArgument,
    out: OutArgument,
    base: BaseOption = None,
    shard_size: Annotated[
        str, typer.Option(help="Most bytes of one file of weights, and about what it takes.")
    ] = "2GB",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into its base, and write an ordinary model directory with the processor."""
    done = mmpeft.merge(adapter, out, base=base, shard_size=shard_size, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(asdict(done))
        return
    console = human(as_json)
    if done.adapter is None:
        console.print(
            f"{done.base} is a whole model, with nothing to merge: it was copied", markup=False, soft_wrap=True
        )
    else:
        console.print(f"merged {done.changed} of {done.tensors} tensors of {done.base}", markup=False, soft_wrap=True)
    if done.untied:
        console.print(
            "embeddings and head are two tensors now: the adapter changes one of them", markup=False, soft_wrap=True
        )
    files = "1 file" if done.shards == 1 else f"{done.shards} files"
    console.print(f"wrote {done.output}: {size(done.bytes)} in {files}", markup=False, soft_wrap=True)


def compose(
    adapter: AdapterArgument,
    out: OutArgument,
    base: BaseOption = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy files of the base instead of linking them.")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put an adapter's projector into its base, and leave a pure LoRA beside it, which servers take."""
    done = composing.compose(adapter, out, base=base, link=not copy, trust_remote_code=trust_remote_code)
    for note in done.notes:
        err.print(f"note: {note}", markup=False, soft_wrap=True)
    if as_json:
        print_json(asdict(done))
        return
    console = human(as_json)
    brought = f"{len(done.linked)} linked, {len(done.copied)} copied"
    files = f"{len(done.rewritten)} of its files rewritten, {brought}"
    console.print(
        f"{done.model}: the base with {done.baked} trained tensors in it; {files}", markup=False, soft_wrap=True
    )
    if done.adapter is None:
        console.print("the adapter has no LoRA, so the model is all there is", markup=False, soft_wrap=True)
    else:
        console.print(f"{done.adapter}: a pure LoRA on that model", markup=False, soft_wrap=True)
