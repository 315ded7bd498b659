"""Every shipped recipe of a family, found by itself, runs from end to end on the family's tiny model."""

import json
import wave

import numpy as np
import pytest
from PIL import Image

from mmpeft import Recipe, run
from mmpeft.config.shipped import shipped_recipes
from tests.families.models import FIRST_CLASS, SINGLE_TURN
from tests.models.parts import tiny_language, tiny_vision
from tests.tiny import tiny_image_processor, tiny_tokenizer

RECIPES = [recipe for recipe in shipped_recipes() if "/" in recipe.name and not recipe.name.startswith("accelerate/")]


def test_every_first_class_family_has_recipes():
    named = {recipe.name.split("/")[0] for recipe in RECIPES}
    assert set(FIRST_CLASS) <= named


def write_samples(folder, sound):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "eval"):
        rows = []
        for index in range(4):
            if sound:
                name = f"{split}-{index}.wav"
                with wave.open(str(folder / name), "wb") as file:
                    file.setparams((1, 2, 16_000, 0, "NONE", ""))
                    file.writeframes(generator.integers(-9000, 9000, 8_000, dtype=np.int16).tobytes())
            else:
                name = f"{split}-{index}.png"
                size = (24 + 4 * index, 40 - 6 * index, 3)
                Image.fromarray(generator.integers(0, 255, size, dtype=np.uint8)).save(folder / name)
            turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "yes" if index % 2 else "no"}]
            rows.append({"id": f"{index}", "audio" if sound else "image": name, "conversations": turns})
        (folder / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")


def base_of(family, folder):
    if (folder / "config.json").is_file():
        return
    model, processor = FIRST_CLASS[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def compose_settings(folder):
    tokenizer = tiny_tokenizer()
    for name, part, files in (
        ("vision", tiny_vision("clip"), tiny_image_processor()),
        ("language", tiny_language("llama", tokenizer), tokenizer),
    ):
        part.save_pretrained(folder / name)
        files.save_pretrained(folder / name)
    return (f"model.vision={folder / 'vision'}", f"model.language={folder / 'language'}")


@pytest.mark.slow
@pytest.mark.parametrize("shipped", RECIPES, ids=lambda recipe: recipe.name)
def test_it_runs(shipped, tmp_path):
    family = shipped.name.split("/")[0]
    write_samples(tmp_path / "data", sound=family == "qwen2_audio")
    settings = [
        f"data.train={tmp_path / 'data' / 'train.json'}",
        f"data.eval={tmp_path / 'data' / 'eval.json'}",
        f"data.media_root={tmp_path / 'data'}",
        f"output={tmp_path / 'run'}",
        "batch={size: 2, micro: 2}",
        "device=cpu",
        "dtype=float32",
        "evaluate={max_new_tokens: 2}",
    ]
    if "vision" in (Recipe.from_yaml(shipped.path).to_dict()["model"] or {}) and shipped.name.endswith("/compose"):
        settings += compose_settings(tmp_path)
    else:
        base_of(family, tmp_path / "base")
        settings.append(f"model={tmp_path / 'base'}")
    stages = Recipe.from_yaml(shipped.path).stages
    settings += [f"stages.{stage.name}.max_steps=1" for stage in stages]
    recipe = Recipe.from_yaml(shipped.path, tuple(settings))
    result = run(recipe)
    assert [stage["status"] for stage in result.stages] == ["trained"] * len(stages)
    written = tmp_path / "run" / "adapter"
    assert written.is_dir() or any((tmp_path / "run" / "stages").glob("*/model"))
    assert family in SINGLE_TURN or (tmp_path / "run" / "evaluation.json").is_file()
