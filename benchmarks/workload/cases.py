"""What is trained on: cases by name, and their samples as LLaVA JSON (mmpeft) and as plain rows (the peers)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

LEARNING_RATE = 1e-3
PROJECTOR = {"projector": "full"}
LORA = {"projector": "full", "language": {"r": 16, "lora_alpha": 32}}
TRAINS = {"projector": PROJECTOR, "lora": LORA}
"""The two stages of mmpeft's preset `two-stage`."""

Kind = Literal["distinct", "eight", "mixed", "several"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload.

    Attributes:
        kind: `distinct`, each sample its own picture; `eight`, eight questions a picture; `mixed`, short and long
            answers, half of the samples text alone; `several`, two or three pictures a sample.
        model: `llava`, or `qwen` (Qwen2.5-VL, with mrope).
        stage: `projector`, or `lora` (LoRA on the language model, the projector trained too).
        samples: of an epoch; `batch` of them a step.
    """

    kind: Kind
    model: Literal["llava", "qwen"] = "llava"
    stage: Literal["projector", "lora"]
    dtype: Literal["float32", "bfloat16"]
    samples: int
    batch: int
    epochs: int = 1

    @property
    def name(self) -> str:
        """Such as `distinct-lora-llava-fp32`."""
        return f"{self.kind}-{self.stage}-{self.model}-{'fp32' if self.dtype == 'float32' else 'bf16'}"

    @property
    def steps(self) -> int:
        """Of all epochs."""
        return self.epochs * -(-self.samples // self.batch)


def _cases() -> tuple[Case, ...]:
    cases = []
    for dtype in ("float32", "bfloat16"):
        cases += [
            Case(kind="distinct", stage="projector", dtype=dtype, samples=8, batch=4, epochs=3),
            Case(kind="distinct", stage="lora", dtype=dtype, samples=8, batch=4, epochs=3),
            Case(kind="eight", stage="lora", dtype=dtype, samples=32, batch=16),
            Case(kind="mixed", stage="lora", dtype=dtype, samples=16, batch=8),
        ]
    return (
        *cases,
        Case(kind="several", stage="lora", dtype="bfloat16", samples=8, batch=4),
        Case(kind="distinct", model="qwen", stage="lora", dtype="bfloat16", samples=8, batch=4, epochs=3),
        Case(kind="eight", model="qwen", stage="lora", dtype="float32", samples=16, batch=16),
    )


CASES: dict[str, Case] = {case.name: case for case in _cases()}
QUICK = ("distinct-lora-llava-fp32", "distinct-lora-llava-bf16", "eight-lora-llava-fp32", "mixed-lora-llava-bf16")
"""What `--quick` runs: each finding once."""

_MIXED = ((1, 12), (0, 20), (1, 300), (0, 12), (1, 12), (0, 400), (0, 30), (1, 40))
"""Pictures, and bytes of the answer, of eight samples of `mixed`."""


def make_rows(case: Case) -> list[dict[str, Any]]:
    """Samples as `{"images": [name], "question", "answer"}`."""
    rows = []
    for index in range(case.samples):
        pictures, length = {
            "distinct": ((index,), 10),
            "eight": ((index // 8,), 10),
            "mixed": ((index,) * _MIXED[index % 8][0], _MIXED[index % 8][1]),
            "several": (tuple(3 * index + number for number in range(2 + index % 2)), 20),
        }[case.kind]
        subject = f"picture {index}" if pictures else f"number {index}"
        words = f"thing {index % 7} " * (1 + length // 8)
        rows.append(
            {
                "images": [f"{number}.png" for number in pictures],
                "question": f"What is in {subject}, said in words?",
                "answer": words[:length].rstrip(),
            }
        )
    return rows


def write_data(case: Case, folder: Path, side: int) -> None:
    """Pictures of `side` pixels, `data.json` as LLaVA has it, and `rows.json`, plain.

    The pictures are noise, so no two are alike and none compresses.
    """
    noise = np.random.default_rng(0)
    rows = make_rows(case)
    for name in sorted({name for row in rows for name in row["images"]}):
        Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / name)
    # A newline after a picture only where the model's template writes one.
    mark = "<image>\n" if case.model == "llava" else "<image>"
    llava = []
    for index, row in enumerate(rows):
        turns = [
            {"from": "human", "value": mark * len(row["images"]) + row["question"]},
            {"from": "gpt", "value": row["answer"]},
        ]
        pictures = {"image": row["images"]} if row["images"] else {}
        llava.append({"id": str(index), **pictures, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(llava), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def make_recipe(case: Case, *, model: Path, data: Path, output: Path, device: str) -> dict[str, Any]:
    """The case as a user of mmpeft writes it: what the comparison fixes, and everything else at its default."""
    return {
        "model": str(model),
        "data": {"train": str(data / "data.json")},
        "stages": [
            {
                "name": case.stage,
                "train": TRAINS[case.stage],
                "learning_rate": LEARNING_RATE,
                "epochs": case.epochs,
                "trainer": {
                    "lr_scheduler_type": "constant",
                    "warmup_steps": 0,
                    "weight_decay": 0.0,
                    "max_grad_norm": 0.0,
                    "train_sampling_strategy": "sequential",
                    "logging_steps": 1,
                    "save_strategy": "no",
                },
            }
        ],
        "batch": {"size": case.batch},
        "dtype": case.dtype,
        "device": device,
        "output": str(output),
    }
