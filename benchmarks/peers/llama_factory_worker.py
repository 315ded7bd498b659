"""A workload of benchmarks/training_speed.py by LLaMA-Factory: llama_factory_worker.py WORKLOAD.json

Its template for LLaVA 1.5 has a system text that the others lack, and that for Qwen2.5-VL a label on the newline behind
the last turn; so others are registered, by its own function.
"""

import json
import sys
from pathlib import Path

import beside_cpu  # noqa: F401, before what imports torchvision and torchaudio

from llamafactory.data.formatter import EmptyFormatter, StringFormatter  # isort: skip
from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.template import register_template
from llamafactory.train.tuner import run_exp
from rows import as_messages
from steps import watch

TEMPLATES = {"llava": "llava_without_system", "qwen": "qwen2_vl_without_newline"}
MARKS = {"llava": "<image>\n", "qwen": "<image>"}
register_template(
    name=TEMPLATES["llava"],
    format_prefix=EmptyFormatter(slots=[{"bos_token"}]),
    format_user=StringFormatter(slots=["USER: {{content}}\nASSISTANT:"]),
    mm_plugin=get_mm_plugin(name="llava", image_token="<image>"),
)
register_template(
    name=TEMPLATES["qwen"],
    format_user=StringFormatter(slots=["<|im_start|>user\n{{content}}<|im_end|>\n<|im_start|>assistant\n"]),
    format_assistant=StringFormatter(slots=["{{content}}<|im_end|>"]),
    format_system=StringFormatter(slots=["<|im_start|>system\n{{content}}<|im_end|>\n"]),
    default_system="You are a helpful assistant.",
    mm_plugin=get_mm_plugin(name="qwen2_vl", image_token="<|image_pad|>", video_token="<|video_pad|>"),
)
work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
watch(work["result"])
own = Path(work["output"] + "-data")
own.mkdir()
(own / "samples.json").write_text(json.dumps(as_messages(work, MARKS[work["kind"]])), encoding="utf-8")
about = {
    "file_name": "samples.json",
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
(own / "dataset_info.json").write_text(json.dumps({"samples": about}), encoding="utf-8")
run_exp(
    {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "model_name_or_path": work["model"],
        "adapter_name_or_path": work["adapter"],
        "template": TEMPLATES[work["kind"]],
        "dataset": "samples",
        "dataset_dir": str(own),
        "cutoff_len": 8192,
        "disable_shuffling": True,
        "output_dir": work["output"],
        "per_device_train_batch_size": work["batch"],
        "gradient_accumulation_steps": 1,
        "num_train_epochs": work["epochs"],
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": work["device"] == "cpu",
        "bf16": work["dtype"] == "bfloat16",
        "disable_gradient_checkpointing": True,
    }
)
