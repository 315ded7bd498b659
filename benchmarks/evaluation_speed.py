"""Evaluation speed at the same answers: mmpeft against transformers' `generate`, in turn, on many questions a picture.

    python benchmarks/evaluation_speed.py [--per-picture 8] [--pictures 8] [--new-tokens 8 32] [--rounds 2]

A LLaVA of the shape of SmolLM2-135M with a CLIP ViT-B/16 tower (random weights) answers questions of unequal length,
greedily. `generate` runs as a user would write it: questions sorted by length, padded batches of the same size, the
processor's own call. Both read the pictures from disk. The answers of both are compared word for word: where one
differs, nothing is written. Writes benchmarks/results/evaluation_speed.json; the figure to trust is the ratio.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from workload.shapes import make_model

import mmpeft
from mmpeft.data.types import Question, Turn
from mmpeft.evaluation.generate import Answers, answer_questions
from mmpeft.pipeline.facts import hardware, versions

RESULTS = Path(__file__).parent / "results" / "evaluation_speed.json"
WORDS = [
    "what",
    "which",
    "who",
    "is",
    "are",
    "there",
    "in",
    "the",
    "picture",
    "above",
    "below",
    "left",
    "red",
    "blue",
    "why",
    "not",
    "how",
    "many",
]


def make_questions(folder: Path, *, pictures: int, per_picture: int, side: int) -> list[Question]:
    """Of 4 to 12 words each, several on each picture."""
    noise = np.random.default_rng(0)
    questions = []
    for picture in range(pictures):
        name = f"{picture}.png"
        Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / name)
        for _ in range(per_picture):
            text = " ".join(noise.choice(WORDS, size=noise.integers(4, 13)))
            prompt = (Turn(role="user", text=f"<image>\n{text}?"),)
            questions.append(Question(id=str(len(questions)), prompt=prompt, images=(name,), reference=""))
    return questions


def plain(model: Any, processor: Any, questions: list[Question], *, folder: Path, tokens: int, batch: int) -> list[str]:
    """Sorted, padded batches through `generate`."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        for text in (question.prompt[0].text.removeprefix("<image>\n") for question in questions)
    ]
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    answers = [""] * len(texts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = processor(
            text=[texts[number] for number in chosen],
            images=[Image.open(folder / questions[number].images[0]) for number in chosen],
            padding=True,
            padding_side="left",
            # The template has written what stands before a text.
            add_special_tokens=False,
            return_tensors="pt",
        ).to(model.device)
        with torch.no_grad():
            said = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        for number, row in zip(chosen, said[:, inputs["input_ids"].shape[1] :], strict=True):
            answers[number] = processor.decode(row, skip_special_tokens=True).strip()
    return answers


def measure(options: argparse.Namespace, model: Any, processor: Any, folder: Path, tokens: int) -> dict[str, Any]:
    """Both in turn, of answers of so many tokens at most.

    Raises:
        SystemExit: their answers differ.
    """
    questions = make_questions(folder, pictures=options.pictures, per_picture=options.per_picture, side=options.side)
    seconds: dict[str, list[float]] = {"mmpeft": [], "generate": []}
    ours = expected = None
    for number in range(options.rounds):
        for name in sorted(seconds, reverse=bool(number % 2)):
            begin = time.perf_counter()
            if name == "mmpeft":
                ours = answer_questions(
                    model, processor, questions, media_root=folder, max_new_tokens=tokens, batch_size=options.batch
                )
            else:
                expected = plain(model, processor, questions, folder=folder, tokens=tokens, batch=options.batch)
            seconds[name].append(time.perf_counter() - begin)
    assert isinstance(ours, Answers)
    assert expected is not None
    if differ := sum(one != other for one, other in zip(ours.texts, expected, strict=True)):
        raise SystemExit(f"{differ} of {len(questions)} answers differ: nothing is written")
    rates = {name: len(questions) / statistics.median(found) for name, found in seconds.items()}
    return {
        "new_tokens": tokens,
        "questions": len(questions),
        "per_picture": options.per_picture,
        "batch": options.batch,
        "questions_per_second": rates,
        "ratio": rates["mmpeft"] / rates["generate"],
        "seconds": seconds,
        "prompt_tokens": ours.work.prompts,
        "prompt_tokens_padded": ours.work.padded,
        "steps": ours.work.steps,
    }


def main() -> None:
    """Measure, compare, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-picture", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tiny", action="store_true", help="a smoke test: a tiny model")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    size, options.side = ("tiny", 32) if options.tiny else ("135m", 224)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model("llava", size, folder / "model")
        model, processor = mmpeft.load_model(str(folder / "model"), device=options.device, dtype=options.dtype)
        cases = [measure(options, model.eval(), processor, folder, tokens) for tokens in options.new_tokens]
    facts = {"hardware": hardware(torch.device(options.device)), "versions": versions(), "dtype": options.dtype}
    found = json.dumps({"command": "python benchmarks/evaluation_speed.py", **facts, "cases": cases}, indent=2)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(found + "\n", encoding="utf-8")
    sys.stdout.write(found + "\n")


if __name__ == "__main__":
    main()
