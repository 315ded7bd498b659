"""A workload's samples and model, as several programs take them; each imports what it needs when it is called."""

import json
from pathlib import Path


def read_rows(work):
    """The samples: `{"images": [name], "question", "answer"}`."""
    return json.loads((Path(work["data"]) / "rows.json").read_text(encoding="utf-8"))


def as_messages(work, mark="<image>"):
    """The samples as ms-swift and LLaMA-Factory take them, with `mark` for each picture; `images` only where any."""
    folder = Path(work["data"])
    return [
        {
            "messages": [
                {"role": "user", "content": mark * len(row["images"]) + row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            **({"images": [str(folder / name) for name in row["images"]]} if row["images"] else {}),
        }
        for row in read_rows(work)
    ]
