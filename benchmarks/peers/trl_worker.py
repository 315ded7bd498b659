"""The workload of benchmarks/train_speed.py by TRL's SFTTrainer: python trl_worker.py WORKLOAD.json"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset, Image
from peft import PeftModel
from steps import watch
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
dtype = getattr(torch, work["dtype"])
processor = AutoProcessor.from_pretrained(work["model"])
model = AutoModelForImageTextToText.from_pretrained(work["model"], dtype=dtype)
model = PeftModel.from_pretrained(model, work["adapter"], is_trainable=True)
rows = json.loads(Path(work["data"]).read_text(encoding="utf-8"))
folder = Path(work["data"]).parent
dataset = Dataset.from_list(
    [
        {
            "images": [str(folder / row["image"])],
            "prompt": [{"role": "user", "content": row["conversations"][0]["value"].removeprefix("<image>\n")}],
            "completion": [{"role": "assistant", "content": row["conversations"][1]["value"]}],
        }
        for row in rows
    ]
).cast_column("images", [Image()])
arguments = SFTConfig(
    output_dir=work["output"],
    per_device_train_batch_size=work["batch"],
    max_steps=work["steps"],
    learning_rate=work["learning_rate"],
    lr_scheduler_type="constant",
    weight_decay=0.0,
    max_grad_norm=0.0,
    train_sampling_strategy="sequential",
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=work["dtype"] == "bfloat16",
    gradient_checkpointing=False,
    completion_only_loss=True,
    max_length=None,
    disable_tqdm=True,
)
SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=processor).train()
