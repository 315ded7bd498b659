"""The quickstart's data and vision tower: scikit-learn's handwritten digits as pictures with questions.

Source of the pictures: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
Learning Repository (CC BY 4.0), as `sklearn.datasets.load_digits` ships them: 1,797 digits of 8 x 8 pixels.
"""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmpeft.core.files import ensure_directory, write_json, writing
from mmpeft.core.optional import require

SIDE, PATCH = 32, 16
"""Pixels of a picture's side, and of a patch: 4 picture tokens."""

PATCHES = (SIDE // PATCH) ** 2

QUESTIONS = {
    "digit": "Which digit is written here?",
    "parity": "Is the digit even or odd?",
    "compare": "Is the digit greater than four?",
    "next": "Which digit comes after this one?",
}
"""Kind of question -> its text."""


def reference(kind: str, digit: int) -> str:
    """The true answer to a question about a digit."""
    return {
        "digit": str(digit),
        "parity": "odd" if digit % 2 else "even",
        "compare": "yes" if digit > 4 else "no",
        "next": str((digit + 1) % 10),
    }[kind]


@dataclass(frozen=True, kw_only=True)
class Digits:
    """What was written: the folder, and the training pictures with their digits for the tower.

    Attributes:
        folder: holds images/, train.json and eval.json.
        pixels: float [pictures, SIDE, SIDE] in 0..1, training pictures only.
        labels: long [pictures], 0..9.
    """

    folder: Path
    pixels: torch.Tensor
    labels: torch.Tensor


def write_digits(folder: Path, *, seed: int, train: int | None = None, held_out: int = 100) -> Digits:
    """Write the digits as PNG files with LLaVA JSON beside them: `train.json` and, other pictures, `eval.json`.

    Args:
        train: number of training pictures; None for all that are not held out.
        held_out: number of pictures that go to eval.json.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
        OutputError: the folder cannot be written.
    """
    digits = require("sklearn.datasets", extra="quickstart").load_digits()
    images = ensure_directory(folder / "images")
    order = np.random.default_rng(seed).permutation(len(digits.target))
    chosen = {"eval": order[:held_out], "train": order[held_out:][:train]}
    pixels = []
    for split, indices in chosen.items():
        rows = []
        for index in indices:
            digit = int(digits.target[index])
            picture = _upscale(digits.images[index])
            name = f"digit-{index:04d}.png"
            _write_picture(picture, images / name)
            if split == "train":
                pixels.append(np.asarray(picture, dtype=np.float32) / 255)
            rows += [_row(int(index), name, kind, digit) for kind in QUESTIONS]
        write_json(folder / f"{split}.json", rows)
    return Digits(
        folder=folder,
        pixels=torch.tensor(np.stack(pixels)),
        labels=torch.tensor([int(digits.target[index]) for index in chosen["train"]]),
    )


def _upscale(image: np.ndarray) -> Image.Image:
    """8 x 8 values of 0..16 as a grey picture of SIDE x SIDE."""
    grey = Image.fromarray((image * (255 / 16)).round().astype(np.uint8))
    return grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def _write_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG unless the same stands there: its time then stays, and with it what was trained on it."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    if not path.exists() or path.read_bytes() != buffer.getvalue():
        with writing(path):
            path.write_bytes(buffer.getvalue())


def _row(index: int, image: str, kind: str, digit: int) -> dict[str, object]:
    return {
        "id": f"{index:04d}-{kind}",
        "image": image,
        "kind": kind,
        "conversations": [
            {"from": "human", "value": f"<image>\n{QUESTIONS[kind]}"},
            {"from": "gpt", "value": reference(kind, digit)},
        ],
    }


def tower_processor() -> CLIPImageProcessor:
    """What turns a picture into the tower's pixels: SIDE x SIDE, values in -1..1."""
    side = {"height": SIDE, "width": SIDE}
    half = [0.5, 0.5, 0.5]
    return CLIPImageProcessor(size=side, do_center_crop=False, image_mean=half, image_std=half)


def _clip(**sizes: Any) -> PreTrainedModel:
    return CLIPVisionModel(CLIPVisionConfig(projection_dim=sizes["hidden_size"], **sizes))


def _siglip(**sizes: Any) -> PreTrainedModel:
    return SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **sizes))


TOWERS: Mapping[str, Callable[..., PreTrainedModel]] = {"clip": _clip, "siglip": _siglip}
"""Untrained towers by what they are shaped like."""


def train_tower(digits: Digits, folder: Path, *, seed: int, epochs: int = 12, kind: str = "clip") -> float:
    """Train a four-layer tower to tell the training digits apart, and save it as an ordinary model.

    A linear head on the mean of the last layer's patch features learns along and is thrown away: what stays
    is a tower in which every patch knows what is written. The held-out pictures are not touched.

    Args:
        digits: what it is trained on.
        folder: where it is saved.
        seed: of its first weights, and of the order of pictures.
        epochs: how often each picture is seen.
        kind: one of `TOWERS`.

    Returns:
        Accuracy of the head on the training pictures in the last epoch.
    """
    torch.manual_seed(seed)
    tower = TOWERS[kind](
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
    )
    head = nn.Linear(128, 10)
    with _one_thread():
        correct = _fit(tower, head, digits.pixels, digits.labels, epochs=epochs)
    tower.eval().save_pretrained(folder)
    tower_processor().save_pretrained(folder)
    return correct


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Operations this small gain nothing from a second thread, and wait for it where a core is busy: seven times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(tower: PreTrainedModel, head: nn.Linear, pixels: torch.Tensor, labels: torch.Tensor, *, epochs: int) -> float:
    size = 64
    parameters = [*tower.parameters(), *head.parameters()]
    steps = epochs * math.ceil(len(labels) / size)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.15)
    inputs = ((pixels - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)
    correct = 0
    for _ in range(epochs):
        correct = 0
        for batch in torch.randperm(len(labels)).split(size):
            hidden = tower(_jitter(inputs[batch]), output_hidden_states=True).hidden_states[-1]
            # A class token, where there is one, stands first.
            logits = head(hidden[:, -PATCHES:].mean(1))
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            correct += int((logits.argmax(1) == labels[batch]).sum())
    return correct / len(labels)


def _jitter(pixels: torch.Tensor) -> torch.Tensor:
    """Each picture turned by up to 10 degrees, scaled by up to 10 % and moved by up to 6 %: [n, 3, SIDE, SIDE]."""
    count = len(pixels)
    angle = (torch.rand(count) - 0.5) * 0.35
    scale = 1 + (torch.rand(count) - 0.5) * 0.2
    move = (torch.rand(count, 2) - 0.5) * 0.25
    rows: Sequence[torch.Tensor] = (
        torch.stack([scale * angle.cos(), -scale * angle.sin(), move[:, 0]], 1),
        torch.stack([scale * angle.sin(), scale * angle.cos(), move[:, 1]], 1),
    )
    grid = functional.affine_grid(torch.stack(tuple(rows), 1), list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
