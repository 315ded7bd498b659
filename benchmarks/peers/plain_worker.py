"""A workload of benchmarks/training_speed.py by transformers' own Trainer, padded batches: plain_worker.py WORK.json"""

import json
import sys
from pathlib import Path

# First, for it makes a CUDA build of torchvision importable beside a CPU build of torch.
from loading import load, options  # isort: skip

import torch
from PIL import Image
from rows import read_rows
from steps import watch
from transformers import Trainer, TrainingArguments

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
model, processor = load(work)
folder = Path(work["data"])


def texts(row):
    """The prompt of a row, and prompt and answer."""
    asked = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": row["question"]}]
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
    ]
    prompt = processor.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    return prompt, processor.apply_chat_template(turns, tokenize=False)


def collate(rows):
    """A padded batch with labels on the answers: bytes are tokens, so an answer's length is known."""
    pairs = [texts(row) for row in rows]
    images = [Image.open(folder / name).convert("RGB") for row in rows for name in row["images"]]
    batch = processor(
        text=[whole for _, whole in pairs],
        images=images or None,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        add_special_tokens=False,
    )
    tokenize = processor.tokenizer
    labels = torch.full_like(batch["input_ids"], -100)
    for number, (prompt, whole) in enumerate(pairs):
        answer = len(tokenize(whole.removeprefix(prompt), add_special_tokens=False)["input_ids"])
        end = int(batch["attention_mask"][number].sum())
        labels[number, end - answer : end] = batch["input_ids"][number, end - answer : end]
    return {**batch, "labels": labels}


arguments = TrainingArguments(**options(work), remove_unused_columns=False)
Trainer(model=model, args=arguments, train_dataset=read_rows(work), data_collator=collate).train()
