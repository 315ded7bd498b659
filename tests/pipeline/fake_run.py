"""A run directory made up for tests of the report and the card: nothing in it was measured or trained."""

import json
import math
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFilter

from mmpeft.core.files import write_json, write_text
from mmpeft.data.types import Question, Turn
from mmpeft.evaluation.scores import score_answers
from mmpeft.pipeline.digits import QUESTIONS, reference

PICTURES = 24
RIGHT = {
    "before": {},
    "projector": {"digit": 0.70, "parity": 0.87, "compare": 0.75, "next": 0.58},
    "language": {"digit": 0.95, "parity": 0.95, "compare": 0.92, "next": 0.88},
}
RECIPE = {
    "model": {"vision": "runs/made-up/tower", "language": "made-up/language-135M", "projector": "mlp"},
    "data": {
        "train": "data/train.json",
        "eval": "data/eval.json",
        "media_root": "data/images",
        "on_error": "skip",
        "max_skipped": 0.01,
    },
    "stages": [
        {"name": "projector", "train": {"projector": "full"}, "learning_rate": 2e-3, "max_steps": 50},
        {
            "name": "language",
            "train": {"projector": "full", "language": {"r": 16, "lora_alpha": 32}},
            "learning_rate": {"language": 1e-3, "projector": 5e-4},
            "max_steps": 60,
        },
    ],
    "batch": {"size": 16},
    "evaluate": {"metrics": ["exact_match", "anls"]},
    "seed": 0,
}
VERSIONS = {
    "python": "3.11.7",
    "mmpeft": "0.1.0",
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
}


def draw_digit(digit: int, seed: int, side: int = 32) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("L", (side, side), 0)
    ImageDraw.Draw(image).text((side * 0.31, side * 0.08), str(digit), fill=255, font_size=side * 0.75)
    image = image.rotate(float(rng.uniform(-14, 14))).filter(ImageFilter.GaussianBlur(side / 40))
    noise = rng.normal(0, 12, (side, side))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


def part(state: str, parameters: int, trainable: int = 0, rate: float | None = None) -> dict:
    return {"state": state, "parameters": parameters, "trainable": trainable, "learning_rate": rate}


PARTS = [
    {
        "vision": part("frozen", 566_016),
        "projector": part("full", 406_656, 406_656, 2e-3),
        "language": part("frozen", 134_515_008),
    },
    {
        "vision": part("frozen", 566_016),
        "projector": part("full", 406_656, 406_656, 5e-4),
        "language": part("lora", 134_515_008, 4_884_480, 1e-3),
    },
]


def write_fake_run(folder: Path, *, answers: dict[str, str] | None = None) -> Path:
    """`folder/run` with pictures in `folder/images`; returns the run.

    Args:
        answers: what the trained model says to the question of this id, in place of what is drawn by lot.
    """
    run, images = folder / "run", folder / "images"
    images.mkdir(parents=True)
    _write_stages(run)
    write_json(run / "evaluation.json", _evaluations(images, answers or {}))
    write_text(run / "recipe.yaml", yaml.safe_dump(RECIPE, sort_keys=False, allow_unicode=True))
    skipped = [
        {
            "file": "data/train.json",
            "index": 412,
            "line": 4121,
            "reason": "picture 'digit-0412.png' is corrupt or truncated: image file is truncated (2 bytes missing)",
        },
        {
            "file": "data/train.json",
            "index": 977,
            "line": 9771,
            "reason": "2 <image> placeholders for 1 picture; write one for each",
        },
    ]
    train = {"file": "data/train.json", "media_root": str(images), "samples": 6786, "fingerprint": "3f" * 32}
    held_out = {"file": "data/eval.json", "media_root": str(images), "samples": 96, "fingerprint": "a7" * 32}
    write_json(
        run / "data.json",
        {
            "train": {**train, "truncated": 3, "skipped": skipped},
            "eval": {**held_out, "truncated": 0, "skipped": []},
        },
    )
    write_json(
        run / "run.json",
        {
            "versions": VERSIONS,
            "device": "cpu",
            "processes": 1,
            "hardware": "Made-up CPU, 2 cores",
            "started": "2026-01-02T03:04:05+00:00",
            "seconds": 271.4,
            "peak_memory_bytes": 2_481_979_392,
        },
    )
    write_facts(run)
    return run


def write_facts(run: Path) -> dict:
    """`adapter/mmpeft.json` as the pipeline writes it, from the run's other files."""
    read = {name: json.loads((run / f"{name}.json").read_text(encoding="utf-8")) for name in ("evaluation", "data")}
    scored = {name: read["evaluation"][name] for name in ("before", "after")}
    facts = {
        "mmpeft_version": "0.1.0",
        "input_hash": "c0" * 32,
        "base_model": "runs/made-up/model",
        "family": "llava",
        "recipe": RECIPE,
        "stages": ["projector", "language"],
        "parts": PARTS[1],
        "data": read["data"],
        "versions": VERSIONS,
        "metrics": {name: entry["metrics"] for name, entry in scored.items()},
        "by_kind": {name: entry["by_kind"] for name, entry in scored.items()},
    }
    write_json(run / "adapter" / "mmpeft.json", facts)
    return facts


def _write_stages(run: Path) -> None:
    rng = np.random.default_rng(1)
    plans = []
    for index, (stage, seconds, start, end) in enumerate(
        zip(RECIPE["stages"], (98.2, 131.7), (6.1, 0.42), (0.31, 0.09), strict=True)
    ):
        steps = stage["max_steps"]
        plans.append(
            {
                "name": stage["name"],
                "samples": 6784,
                "steps": steps,
                "epochs": 1.0,
                "batch": {"size": 16, "micro": 16, "accumulation": 1, "processes": 1},
                "parts": PARTS[index],
            }
        )
        rates = {name: row["learning_rate"] for name, row in PARTS[index].items() if row["learning_rate"]}
        rows = []
        for step in range(1, steps + 1):
            decay = (end + (start - end) * math.exp(-7 * step / steps)) * float(rng.lognormal(0, 0.16))
            factor = 0.5 * (1 + math.cos(math.pi * step / steps)) if step > 3 else step / 3
            rows.append(
                {
                    "step": step,
                    "epoch": step * 16 / 6784,
                    "loss": decay,
                    "grad_norm": 1.0,
                    "learning_rate": {name: rate * factor for name, rate in rates.items()},
                    "samples_per_second": 16 * steps / seconds,
                    "tokens_per_second": 16 * steps * 41 / seconds,
                    "memory_bytes": 2_300_000_000,
                    "elapsed_seconds": seconds * step / steps,
                }
            )
        folder = run / "stages" / f"{index + 1:02d}-{stage['name']}"
        write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        figures = {
            "steps": steps,
            "samples": 16 * steps,
            "tokens": 16 * steps * 41,
            "seconds": seconds,
            "samples_per_second": 16 * steps / seconds,
            "tokens_per_second": 16 * steps * 41 / seconds,
            "peak_memory_bytes": 2_250_000_000 + index * 231_979_392,
            "final_loss": rows[-1]["loss"],
            "trainable_parameters": sum(row["trainable"] for row in PARTS[index].values()),
            "total_parameters": sum(row["parameters"] for row in PARTS[index].values()),
            "speedups": [
                {"name": "batch.packing", "on": True, "why": "it can be packed", "saved": {"tokens": 12_300}},
                {"name": "data.cache", "on": index == 0, "why": "one pass", "saved": {"bytes": 2048, "seconds": 12.0}},
                {"name": "batch.share_media", "on": False, "why": "it needs batch.packing", "saved": {}},
            ],
        }
        state = {"name": stage["name"], "index": index, "input_hash": "0" * 64, "output": "adapter"}
        write_json(folder / "stage.json", {**state, "status": "done", "resumed_from": None, "figures": figures})
    write_json(run / "plan.json", {"stages": plans})


def _evaluations(images: Path, answers: dict[str, str]) -> dict:
    rng = np.random.default_rng(2)
    questions, spoken = [], {name: [] for name in RIGHT}
    for index in range(PICTURES):
        digit, name = index % 10, f"digit-{index:04d}.png"
        draw_digit(digit, index).save(images / name)
        for kind, text in QUESTIONS.items():
            turns = (Turn(role="user", text=f"<image>\n{text}"),)
            questions.append(
                Question(
                    id=f"{index:04d}-{kind}", prompt=turns, images=(name,), reference=reference(kind, digit), kind=kind
                )
            )
            wrong = {"parity": "neither", "compare": "maybe"}.get(kind, str((digit + 3) % 10))
            for stage, chances in RIGHT.items():
                if stage == "before":
                    said = "The image shows a person standing in front of a window, looking out"
                else:
                    said = reference(kind, digit) if rng.random() < chances[kind] else wrong
                spoken[stage].append(answers.get(questions[-1].id, said) if stage == "language" else said)
    scored = {
        stage: {**score_answers(questions, said, RECIPE["evaluate"]["metrics"]), "seconds": 7.5}
        for stage, said in spoken.items()
    }
    return {**scored, "after": scored["language"]}
