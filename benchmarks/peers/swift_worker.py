"""The workload of benchmarks/train_speed.py by ms-swift: python swift_worker.py WORKLOAD.json"""

import json
import sys
from pathlib import Path

from steps import watch

work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])

from swift import sft_main  # noqa: E402

sft_main(
    [
        *("--model", work["model"], "--model_type", "llava1_5_hf", "--template", "llava1_5_hf", "--use_hf", "true"),
        *("--dataset", work["swift_data"], "--dataset_shuffle", "false", "--train_dataloader_shuffle", "false"),
        *("--adapters", work["adapter"], "--tuner_type", "lora", "--freeze_aligner", "false"),
        *("--torch_dtype", work["dtype"], "--bf16", "true" if work["dtype"] == "bfloat16" else "false"),
        *("--per_device_train_batch_size", str(work["batch"]), "--gradient_accumulation_steps", "1"),
        *("--max_steps", str(work["steps"]), "--learning_rate", str(work["learning_rate"])),
        *("--lr_scheduler_type", "constant", "--weight_decay", "0", "--max_grad_norm", "0", "--warmup_ratio", "0"),
        *("--gradient_checkpointing", "false", "--attn_impl", "sdpa", "--split_dataset_ratio", "0"),
        *("--logging_steps", "1", "--save_strategy", "no", "--use_cpu", "true", "--dataloader_num_workers", "0"),
        *("--output_dir", work["output"], "--report_to", "none", "--system", ""),
    ]
)
