"""The `train` block of a stage: for each part of the model `full`, `frozen`, or fields of `peft.LoraConfig`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from peft import LoraConfig

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part

PartTraining = Literal["full", "frozen"] | dict[str, Any]
"""How one part is trained: all of its weights, not at all, or by LoRA with these `peft.LoraConfig` fields."""

_RESERVED = {
    "modules_to_save": "give the projector `full` instead: its modules are named for you",
    "task_type": "it follows from the model",
    "peft_type": "every adapter mmpeft writes is a LoRA",
    "inference_mode": "adapters are made for training here",
    "base_model_name_or_path": "it follows from `model`",
    "auto_mapping": "it follows from the model",
    "peft_version": "it is written by peft",
    "rank_pattern": "parts of different rank are expressed through it by mmpeft; set `r` by part",
    "alpha_pattern": "parts of different alpha are expressed through it by mmpeft; set `lora_alpha` by part",
}

LORA_FIELDS: tuple[str, ...] = tuple(
    field.name for field in dataclasses.fields(LoraConfig) if field.name not in _RESERVED
)

_SAFE_INITS = ("gaussian", "pissa", "olora", "orthogonal", "eva", "corda", "loftq", "lora_ga")
_NEEDS_DATA = {
    "eva": "it needs a pass over data before training",
    "corda": "it needs a pass over data before training",
    "lora_ga": "it needs gradients on data before training",
    "loftq": "it replaces the base weights by quantised ones",
}


def train_problems(train: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that is wrong with a `train` block, as pairs of key (`"language.rank"`) and message."""
    problems: list[tuple[str, str]] = []
    for part, training in train.items():
        if part not in PARTS:
            problems.append((part, f"unknown part {part!r}{did_you_mean(part, PARTS)}"))
        elif isinstance(training, str):
            if training not in ("full", "frozen"):
                message = f"found {training!r}; expected 'full', 'frozen' or LoRA fields such as {{r: 16}}"
                problems.append((part, message))
        elif isinstance(training, Mapping):
            problems += [(f"{part}.{key}", message) for key, message in _lora_problems(part, training)]
        else:
            message = f"found {training!r}; expected 'full', 'frozen' or LoRA fields such as {{r: 16}}"
            problems.append((part, message))
    if not problems and all(training == "frozen" for training in train.values()):
        problems.append(("", "nothing would be trained: give at least one part 'full' or LoRA fields"))
    return problems


def _lora_problems(part: str, fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems = []
    for key in fields:
        if key in _RESERVED:
            problems.append((key, f"cannot be set here: {_RESERVED[key]}"))
        elif key not in LORA_FIELDS:
            problems.append((key, f"unknown LoRA field {key!r}{did_you_mean(key, LORA_FIELDS)}"))
    rank = fields.get("r", 8)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(("r", f"found {rank!r}; expected a whole number of at least 1"))
    problems += _init_problems(fields)
    if part == "projector" and not problems and "r" not in fields:
        problems.append(("r", "LoRA on the projector needs an explicit rank; `projector: full` is the usual choice"))
    return problems


def _init_problems(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    init = fields.get("init_lora_weights", True)
    if init is True:
        return []
    if init is False:
        return [
            (
                "init_lora_weights",
                "false would change the model before training; leave it out or choose 'gaussian'",
            )
        ]
    name = str(init).lower().split("_niter_")[0]
    if name in _NEEDS_DATA:
        return [
            (
                "init_lora_weights",
                f"{init!r} is not supported: {_NEEDS_DATA[name]}; choose 'pissa' or 'olora'",
            )
        ]
    if name not in _SAFE_INITS:
        return [("init_lora_weights", f"unknown initialisation {init!r}{did_you_mean(name, _SAFE_INITS[:4])}")]
    if name in ("pissa", "olora") and fields.get("use_dora"):
        return [
            (
                "use_dora",
                f"cannot be combined with init_lora_weights={init!r}: the result is not a plain LoRA",
            )
        ]
    return []


def check_train(train: Mapping[str, Any]) -> dict[Part, PartTraining]:
    """A `train` block with every part named: those left out are `frozen`.

    Raises:
        RecipeError: all problems at once, each with its key and the nearest valid name.
    """
    problems = train_problems(train)
    if problems:
        lines = "\n".join(f"  train{f'.{key}' if key else ''}: {message}" for key, message in problems)
        raise RecipeError(f"the training plan has {len(problems)} problem(s):\n{lines}")
    return {part: train.get(part, "frozen") for part in PARTS}
