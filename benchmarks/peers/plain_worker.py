"""A workload of benchmarks/training_speed.py by transformers' own Trainer, padded batches: plain_worker.py WORK.json"""

import contextlib
import json
import sys
from pathlib import Path

with contextlib.suppress(ImportError):
    import mmpeft  # noqa: F401, which makes a CUDA build of torchvision importable beside a CPU build of torch

import torch
from peft import PeftModel
from PIL import Image
from steps import watch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
processor = AutoProcessor.from_pretrained(work["model"])
model = AutoModelForImageTextToText.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
model = PeftModel.from_pretrained(model, work["adapter"], is_trainable=True)
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
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


arguments = TrainingArguments(
    output_dir=work["output"],
    per_device_train_batch_size=work["batch"],
    num_train_epochs=work["epochs"],
    learning_rate=work["learning_rate"],
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=0.0,
    train_sampling_strategy="sequential",
    remove_unused_columns=False,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=work["device"] == "cpu",
    bf16=work["dtype"] == "bfloat16",
    disable_tqdm=True,
)
rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
