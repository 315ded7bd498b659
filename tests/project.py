"""A whole tiny project on disk: base model, pictures, LLaVA JSON, recipe. Real files, random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from transformers import TrainerCallback

from tests.tiny import tiny_llava, tiny_processor

TWO_STAGES = [
    {"name": "projector", "train": {"projector": "full"}, "learning_rate": 1e-2, "max_steps": 4},
    {
        "name": "language",
        "train": {"projector": "full", "language": {"r": 4}},
        "learning_rate": {"projector": 1e-3, "language": 1e-2},
        "max_steps": 6,
    },
]


def write_base(folder: Path, *, hidden: int = 32) -> Path:
    """A tiny LLaVA with its processor, as an ordinary model directory."""
    processor = tiny_processor()
    model = tiny_llava(processor, hidden=hidden)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_data(folder: Path, *, train: int = 22, held_out: int = 4) -> Path:
    """Bright and dark pictures, each with a question of two kinds."""
    images = folder / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("eval", held_out)):
        rows = []
        for index in range(count):
            bright = bool(index % 2)
            pixels = generator.integers(128, 256, (20, 24, 3)) if bright else generator.integers(0, 128, (20, 24, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(images / f"{split}-{index}.png")
            rows.append(
                {
                    "id": f"{split}-{index}",
                    "image": f"{split}-{index}.png",
                    "kind": "亮" if index % 3 else "light",
                    "conversations": [
                        {"from": "human", "value": "<image>\nbright?" + " really?" * (index % 4)},
                        {"from": "gpt", "value": "yes" if bright else "no"},
                    ],
                }
            )
        (folder / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


def write_project(folder: Path, **changes: object) -> Path:
    """The project with a recipe of two stages; `changes` replace its top-level keys. Returns the recipe's path."""
    if not (folder / "base").exists():
        write_base(folder / "base")
        write_data(folder / "data")
    recipe = {
        "model": str(folder / "base"),
        "data": {
            "train": str(folder / "data" / "train.json"),
            "eval": str(folder / "data" / "eval.json"),
            "media_root": str(folder / "data" / "images"),
        },
        "stages": TWO_STAGES,
        "batch": {"size": 8, "micro": 4},
        "evaluate": {"metrics": ["exact_match"], "max_new_tokens": 3},
        "output": str(folder / "run"),
        "device": "cpu",
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


class StopAfter(TrainerCallback):
    """Breaks off as a kill would, after the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def make_mostly_text(file: Path) -> None:
    """Take the picture away from two samples of three of a data file."""
    rows = json.loads(file.read_text())
    for index, row in enumerate(rows):
        if index % 3:
            del row["image"]
            row["conversations"][0]["value"] = "2 and 2?" + " hm" * (index % 4)
    file.write_text(json.dumps(rows))
