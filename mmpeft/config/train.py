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
    "kasa_config": "it cuts the base weights down, so that answers change before training",
    "layer_replication": "it repeats layers of the base, so that answers change before training",
    "alora_invocation_tokens": "peft applies it to text-only models; on one with pictures it does nothing",
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
    problems += _value_problems(fields)
    problems += _init_problems(fields)
    if part == "projector" and not problems and "r" not in fields:
        problems.append(("r", "LoRA on the projector needs an explicit rank; `projector: full` is the usual choice"))
    return problems


def _value_problems(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Values that peft takes and then fails on in the middle of the model, or that train nothing."""
    rank, alpha, dropout = fields.get("r", 8), fields.get("lora_alpha", 8), fields.get("lora_dropout", 0.0)
    bias, targets = fields.get("bias", "none"), fields.get("target_modules")
    expected = {
        "r": (rank, _is_number(rank) and isinstance(rank, int) and rank >= 1, "a whole number of at least 1"),
        "lora_alpha": (alpha, _is_number(alpha) and alpha > 0, "a number above 0"),
        "lora_dropout": (dropout, _is_number(dropout) and 0 <= dropout < 1, "a number from 0 to below 1"),
        "bias": (bias, bias in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
        "target_modules": (targets, targets is None or _is_names(targets), "a list of names or a regular expression"),
    }
    return [(key, f"found {value!r}; expected {want}") for key, (value, right, want) in expected.items() if not right]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple | set) and all(isinstance(name, str) for name in value)
    )


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
    if name not in _SAFE_INITS or init != str(init).lower():
        return [("init_lora_weights", f"unknown initialisation {init!r}{did_you_mean(name, _SAFE_INITS[:4])}")]
    if name == "orthogonal" and isinstance(fields.get("r", 8), int) and fields.get("r", 8) % 2:
        return [("r", f"found {fields['r']}; init_lora_weights='orthogonal' needs an even rank")]
    if changes_base(fields) and fields.get("use_dora"):
        return [
            (
                "use_dora",
                f"cannot be combined with init_lora_weights={init!r}: the result is not a plain LoRA",
            )
        ]
    return []


def changes_base(fields: Mapping[str, Any]) -> bool:
    """Whether the initialisation subtracts its start from the base weights (PiSSA, OLoRA)."""
    return str(fields.get("init_lora_weights", True)).lower().startswith(("pissa", "olora"))


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
