"""`mmpeft quickstart`: the main job on real data, with nothing to prepare."""

import os
import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.text import Text

from mmpeft.cli.answers import score_table
from mmpeft.cli.output import JsonOption, human, print_json
from mmpeft.core.files import read_json
from mmpeft.core.lazy import LazyModule

pipeline = LazyModule("mmpeft.pipeline.quickstart")

SHADES = " .:-=+*#%@"
"""Dark to bright, where there are no colours."""


class Tower(StrEnum):
    """What a vision tower is shaped like; the same names as `mmpeft.pipeline.digits.TOWERS`."""

    clip = "clip"
    siglip = "siglip"


def quickstart(
    output: Annotated[Path, typer.Option(help="Where to write the run.")] = Path("runs/quickstart"),
    model: Annotated[
        str | None,
        typer.Option(help="A vision-language model (hub id or directory) instead of the composed one."),
    ] = None,
    tower: Annotated[Tower, typer.Option(help="Shape of the composed model's vision tower.")] = Tower.clip,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    smallest: Annotated[
        bool,
        typer.Option("--smallest", help="Two steps a stage: shows that the installation works, learns nothing."),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from the last checkpoint.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Teach a language model to read handwritten digits: data, two stages, evaluation, adapter, report."""
    console = human(as_json)
    result = pipeline.quickstart(
        output, model=model, tower=tower.value, seed=seed, smallest=smallest, resume=resume, console=console
    )
    evaluations = read_json(output / "evaluation.json")
    if as_json:
        print_json(
            {
                "output": output,
                "adapter": result.run.result,
                "report": result.run.report,
                "language_model": result.language,
                "scores": {name: entry["metrics"] for name, entry in evaluations.items()},
                "by_kind": {name: entry["by_kind"] for name, entry in evaluations.items()},
                "example": result.example,
                "seconds": result.seconds,
            }
        )
        return
    shown = {name: evaluations[name] for name in ("before", "after")}
    console.print(score_table(shown))
    _show_example(console, output, result.example)
    picture = output / "data" / "images" / result.example["image"]
    program = "mmpeft" if shutil.which("mmpeft") else f"{os.path.relpath(sys.executable)} -m mmpeft"
    console.print(
        f"\nadapter  {result.run.result}\nreport   {result.run.report}\n"
        f"ask      {program} generate {result.run.result} "
        f"--image {picture} --prompt {result.example['prompt']!r}\n\n"
        "It is a plain PEFT adapter; transformers and peft load it without mmpeft:\n\n"
        "  from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"  model = AutoModelForImageTextToText.from_pretrained({str(result.run.result)!r})\n"
        f"  processor = AutoProcessor.from_pretrained({str(result.run.result)!r})\n\n"
        f"{result.seconds:.0f} s in all",
        soft_wrap=True,
        markup=False,
    )


def _show_example(console: Console, output: Path, example: dict[str, Any]) -> None:
    with Image.open(output / "data" / "images" / example["image"]) as opened:
        picture = opened.convert("L").resize((16, 16))
    console.print(f"\na held-out picture, {example['image']}:")
    for row in range(0, 16, 2):
        line = Text("  ")
        for column in range(16):
            top, bottom = (int(picture.getpixel((column, row + offset))) for offset in (0, 1))  # type: ignore[arg-type]
            if console.color_system is None:
                line.append(SHADES[(top + bottom) * len(SHADES) // 512])
            else:
                line.append("▀", style=f"rgb({top},{top},{top}) on rgb({bottom},{bottom},{bottom})")
        console.print(line)
    console.print(f"  {example['prompt']}  →  [bold]{example['answer']}[/bold]   (true: {example['reference']})")
