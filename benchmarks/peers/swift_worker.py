"""A workload of benchmarks/training_speed.py by ms-swift: swift_worker.py WORKLOAD.json"""

import json
import sys
from pathlib import Path

import beside_cpu  # noqa: F401, before what imports torchvision

from rows import as_messages  # isort: skip
from steps import watch
from swift import sft_main
from swift.template import TEMPLATE_MAPPING
from swift.trainers import Seq2SeqTrainer  # noqa: F401, swift imports it late, and start-up is not to be measured

TYPES = {"llava": "llava1_5_hf", "qwen": "qwen2_5_vl"}
work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
data = Path(work["output"] + ".json")
data.write_text(json.dumps(as_messages(work)), encoding="utf-8")
kind = TYPES[work["kind"]]
if work["kind"] == "qwen":
    # Its own has a newline there, and a label on it.
    TEMPLATE_MAPPING[kind].suffix = ["<|im_end|>"]
# LLaVA's template has no system text; Qwen2.5-VL's has its usual one.
system = ("--system", "") if work["kind"] == "llava" else ()
sft_main(
    [
        *("--model", work["model"], "--model_type", kind, "--template", kind, "--use_hf", "true", *system),
        *("--dataset", str(data), "--dataset_shuffle", "false", "--train_dataloader_shuffle", "false"),
        *("--adapters", work["adapter"], "--tuner_type", "lora", "--freeze_aligner", "false"),
        *("--torch_dtype", work["dtype"], "--bf16", "true" if work["dtype"] == "bfloat16" else "false"),
        *("--per_device_train_batch_size", str(work["batch"]), "--gradient_accumulation_steps", "1"),
        *("--num_train_epochs", str(work["epochs"]), "--learning_rate", str(work["learning_rate"])),
        *("--lr_scheduler_type", "constant", "--warmup_ratio", "0", "--max_grad_norm", "0"),
        # Its own second moment is that of 0.95; the others' is torch's.
        *("--weight_decay", "0", "--adam_beta2", "0.999"),
        *("--gradient_checkpointing", "false", "--attn_impl", "sdpa", "--split_dataset_ratio", "0"),
        *("--logging_steps", "1", "--save_strategy", "no", "--dataloader_num_workers", "0"),
        *("--use_cpu", "true" if work["device"] == "cpu" else "false"),
        *("--output_dir", work["output"], "--report_to", "none"),
    ]
)
