"""`mmpeft plan RECIPE`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import mmpeft
from mmpeft.cli.output import JsonOption, human, print_json
from mmpeft.cli.run import SetOption
from mmpeft.config.device_table import DEVICES, THIS
from mmpeft.core import units
from mmpeft.core.lazy import LazyModule

pipeline = LazyModule("mmpeft.pipeline.run")

_KINDS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "logits and loss",
    "batch": "batch and features",
    "fragmentation": "lost by the allocator",
    "overhead": "libraries and driver",
}

_DeviceOption = Annotated[str, typer.Option(help=f"Device to fit: {THIS}, {', '.join(DEVICES)}.", metavar="NAME")]
_ProcessesOption = Annotated[int | None, typer.Option(min=1, help="Processes that share the work. [default: 1]")]
_SpeedOption = Annotated[
    float | None, typer.Option(min=0.001, help="TFLOP/s that training reaches. [default: by the device]")
]


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).")],
    device: _DeviceOption = THIS,
    processes: _ProcessesOption = None,
    speed: _SpeedOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what each stage would train, in how many steps, how much memory and what time, without training."""
    stages = pipeline.plan(
        mmpeft.Recipe.from_yaml(recipe, tuple(set_ or ())),
        device=device,
        processes=processes,
        speed=None if speed is None else speed * 1e12,
    )
    if as_json:
        print_json({"stages": stages})
        return
    console = human(as_json)
    for stage in stages:
        batch = stage["batch"]
        samples = "samples as they are read" if stage["samples"] is None else f"{stage['samples']} samples"
        console.print(
            f"[bold]{stage['name']}[/bold]: {samples}, {stage['steps']} steps of {batch['size']} "
            f"({_at_once(batch)}, {_by_whom(batch)})",
            soft_wrap=True,
        )
        if found := stage.get("distributed"):
            console.print(f"  shared as {found['name']}: {found['why']}", soft_wrap=True, markup=False)
        for source in stage.get("sources", ()):
            console.print(
                f"  {source['name']}: {source['shown']} of {source['samples']} samples an epoch, "
                f"weight {source['weight']:g}",
                soft_wrap=True,
                markup=False,
            )
        console.print(_table(stage))
        _show_memory(console, stage["memory"])
        _show_work(console, stage["work"])


def _at_once(batch: dict[str, Any]) -> str:
    if batch["tokens"] is not None:
        return f"at most {batch['tokens']} tokens at once"
    return f"{batch['micro']} at once, {batch['accumulation']} accumulated"


def _by_whom(batch: dict[str, Any]) -> str:
    count, together = batch["processes"], batch["together"]
    if together > 1:
        return f"{count} group{'' if count == 1 else 's'} of {together} processes"
    return f"{count} process{'' if count == 1 else 'es'}"


def _table(stage: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("part")
    table.add_column("state")
    for name in ("parameters", "trainable", "learning rate"):
        table.add_column(name, justify="right")
    for name, part in stage["parts"].items():
        rate = part["learning_rate"]
        table.add_row(
            name,
            part["state"],
            f"{part['parameters']:,}",
            f"{part['trainable']:,}",
            "" if rate is None else f"{rate:g}",
        )
    return table


def _show_memory(console: Console, memory: Mapping[str, Any]) -> None:
    table = Table()
    table.add_column(f"memory, {memory['how']}")
    table.add_column("at the peak", justify="right")
    for kind, title in _KINDS.items():
        table.add_row(title, units.size(memory[kind]))
    fits = "fits" if memory["fits"] else "does not fit"
    table.add_row(f"peak ({memory['samples']} samples, {memory['tokens']} tokens)", units.size(memory["peak"]))
    table.add_row(f"{memory['device']}: {fits}", units.size(memory["room"]))
    console.print(table)
    others = (f"{row['title']} {'fits' if row['fits'] else 'does not fit'}" for row in memory["devices"].values())
    console.print(f"  {', '.join(others)}", soft_wrap=True, markup=False)
    for change in memory.get("changes", ()):
        mark = "first:" if change["first"] else "or:"
        text = (
            f"  {mark} {change['what']}, {units.size(change['saves'])} less, a step {change['slower']:g} times as long"
        )
        console.print(text, soft_wrap=True, markup=False)


def _show_work(console: Console, work: Mapping[str, Any]) -> None:
    speed = work["flops"]
    time = f"{units.duration(work['seconds'])} at {speed / 1e12:.3g} TFLOP/s ({work['flops_how']})" if speed else ""
    console.print(f"  {work['flop'] / 1e12:,.3g} TFLOP, {time}", soft_wrap=True, markup=False)
