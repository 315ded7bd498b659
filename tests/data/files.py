"""Data files and pictures for the tests of this folder."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def human(value: str) -> dict[str, str]:
    return {"from": "human", "value": value}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


def row(*turns: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {**fields, "conversations": list(turns or (human("Which colour?"), gpt("red")))}


def write_json(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows), encoding="utf-8")
    return path


def picture(path: Path, size: tuple[int, int] = (16, 12), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def colour_set(folder: Path, count: int = 4) -> Path:
    """`count` samples, each a picture of its own with one question and answer; the last is text only."""
    rows = []
    for number in range(count - 1):
        colour = COLOURS[number % len(COLOURS)]
        picture(folder / f"{number}.png", colour=colour)
        rows.append(row(human("<image>\nWhich colour?"), gpt(colour), id=f"s{number}", image=f"{number}.png"))
    rows.append(row(human("What is 1 + 1?"), gpt("Two, that is 2."), id="text", kind="sum"))
    return write_json(folder / "train.json", rows)
