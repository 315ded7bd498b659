"""The workload of benchmarks/train_speed.py by mmpeft: python mmpeft_worker.py WORKLOAD.json"""

import json
import sys
from pathlib import Path

import mmpeft
from mmpeft.data.packing import PackedCollator
from mmpeft.training.trainer import MultimodalTrainer

# After mmpeft, which makes a CUDA build of torchvision importable beside a CPU build of torch.
from peft import PeftModel  # isort: skip
from transformers import TrainingArguments  # isort: skip
from steps import watch  # isort: skip

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
model, processor = mmpeft.load_model(work["model"], device="cpu", dtype=work["dtype"])
model = PeftModel.from_pretrained(model, work["adapter"], is_trainable=True)
arguments = TrainingArguments(
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
    disable_tqdm=True,
)
dataset = mmpeft.load_dataset(work["data"], processor=processor)
trainer = MultimodalTrainer(
    model=model,
    args=arguments,
    train_dataset=dataset,
    data_collator=PackedCollator(processor) if work["packing"] else mmpeft.MultimodalCollator(processor),
)
trainer.train()
