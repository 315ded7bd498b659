"""A workload of benchmarks/training_speed.py by TRL's SFTTrainer: trl_worker.py WORKLOAD.json

Its own best settings that are exact: bf16 weights where mmpeft has them, its loss over chunks of supervised positions
(the only one that TRL 1.16 has), no activation checkpointing. It refuses packing and padding-free batches of pictures.
"""

import json
import sys
from pathlib import Path

# First, for it makes a CUDA build of torchvision importable beside a CPU build of torch.
from loading import load, options  # isort: skip

from datasets import Dataset, Image, List
from rows import read_rows
from steps import watch
from trl import SFTConfig, SFTTrainer

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
model, processor = load(work)
folder = Path(work["data"])
dataset = Dataset.from_list(
    [
        {
            "images": [str(folder / name) for name in row["images"]],
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in read_rows(work)
    ]
).cast_column("images", List(Image()))
arguments = SFTConfig(
    **options(work),
    gradient_checkpointing=False,
    completion_only_loss=True,
    max_length=None,
)
SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=processor).train()
