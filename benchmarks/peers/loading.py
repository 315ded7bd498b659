"""The model that transformers and TRL train, and what both tell their trainers."""

import contextlib

with contextlib.suppress(ImportError):
    import mmpeft  # noqa: F401, which makes a CUDA build of torchvision importable beside a CPU build of torch

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor


def load(work):
    """The model with its adapter, whose weights train in float32, and the processor."""
    processor = AutoProcessor.from_pretrained(work["model"])
    model = AutoModelForImageTextToText.from_pretrained(work["model"], dtype=getattr(torch, work["dtype"]))
    model = PeftModel.from_pretrained(model, work["adapter"], is_trainable=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, processor


def options(work):
    """Fields of `TrainingArguments` that a comparison fixes."""
    return {
        "output_dir": work["output"],
        "per_device_train_batch_size": work["batch"],
        "num_train_epochs": work["epochs"],
        "learning_rate": work["learning_rate"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": work["device"] == "cpu",
        "bf16": work["dtype"] == "bfloat16",
        "disable_tqdm": True,
    }
