"""Two processes whose batches hold media of different kinds, or none: none waits, and losses are those of one."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

import mmpeft
from mmpeft import Recipe
from mmpeft.core.files import read_json
from mmpeft.training.callbacks import read_metrics
from tests.data.films import film
from tests.families.qwen import tiny_qwen2_5_vl
from tests.processes import accelerate, run_recipe

KINDS = ["text picture", "picture text", "text film", "film text", "picture film", "film picture", "text text"]
"""What the two samples of each step hold: with two processes, the first is one's and the second the other's."""

TURNS = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a thing"}]


def project(folder, train, **trainer):
    model, processor = tiny_qwen2_5_vl()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    pixels = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    film(folder / "a.mp4")
    media = {"text": {}, "picture": {"image": "a.png"}, "film": {"video": "a.mp4"}}
    rows = [{"id": kind, **media[kind], "conversations": TURNS} for step in KINDS for kind in step.split()]
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    stage = {
        "name": "stage",
        "train": train,
        "learning_rate": 1e-2,
        "trainer": {"train_sampling_strategy": "sequential", "logging_steps": 1, **trainer},
    }
    recipe = {
        "model": str(folder / "base"),
        "data": {"train": str(folder / "train.json"), "media": {"max_frames": 4}},
        "stages": [stage],
        "batch": {"size": 2, "micro": 1},
        "output": str(folder / "run"),
        "device": "cpu",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def rows_of(folder):
    return read_metrics(folder / "run" / "stages" / "01-stage" / "metrics.jsonl")


TRAINED = {
    "projector": {"projector": "full"},
    "lora": {"projector": "full", "language": {"r": 4}},
    "vision": {"vision": {"r": 4}, "projector": "full", "language": {"r": 4}},
    "towers": {"vision": "full", "projector": "full", "language": "full"},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "checkpointing"),
    [("lora", False), ("towers", False), ("projector", True), ("vision", True), ("towers", True)],
)
def test_no_process_waits_for_gradients_that_do_not_come(tmp_path, trained, checkpointing):
    options = {"activation_checkpointing": True} if checkpointing else {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (project(tmp_path / name, TRAINED[trained], **options) for name in ("one", "two"))
    mmpeft.run(Recipe.from_yaml(one))
    done = run_recipe(two, launcher=accelerate("cpu_ddp"), timeout=180)
    assert done.returncode == 0, done.stderr[-6000:]
    assert read_json(tmp_path / "two" / "run" / "run.json")["processes"] == 2
    rows = [rows_of(tmp_path / name) for name in ("one", "two")]
    assert len(rows[0]) == len(KINDS)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in rows[0]] == pytest.approx([row[key] for row in rows[1]], abs=1e-4, rel=1e-4)
