"""A workload of benchmarks/training_speed.py by TRL's SFTTrainer: trl_worker.py WORKLOAD.json

Its own best settings that are exact: bf16 weights where mmpeft has them, its loss over chunks of supervised positions
(the only one that TRL 1.16 has), no activation checkpointing. It refuses packing and padding-free batches of pictures.
"""

import contextlib
import json
import sys
from pathlib import Path

with contextlib.suppress(ImportError):
    import mmpeft  # noqa: F401, which makes a CUDA build of torchvision importable beside a CPU build of torch

import torch
from datasets import Dataset, Image, List
from peft import PeftModel
from steps import watch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
processor = AutoProcessor.from_pretrained(work["model"])
model = AutoModelForImageTextToText.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
model = PeftModel.from_pretrained(model, work["adapter"], is_trainable=True)
for parameter in model.parameters():
    if parameter.requires_grad:
        parameter.data = parameter.data.float()
folder = Path(work["data"])
rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
dataset = Dataset.from_list(
    [
        {
            "images": [str(folder / name) for name in row["images"]],
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
).cast_column("images", List(Image()))
arguments = SFTConfig(
    output_dir=work["output"],
    per_device_train_batch_size=work["batch"],
    num_train_epochs=work["epochs"],
    learning_rate=work["learning_rate"],
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=0.0,
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=work["device"] == "cpu",
    bf16=work["dtype"] == "bfloat16",
    gradient_checkpointing=False,
    completion_only_loss=True,
    max_length=None,
    disable_tqdm=True,
)
SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=processor).train()
