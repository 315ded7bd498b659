"""Adapters on a model: `get_peft_model`, the one place where `requires_grad` is decided."""

import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from mmpeft.config.names import did_you_mean
from mmpeft.config.train import PartTraining, check_train
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part
from mmpeft.families.registry import family_of
from mmpeft.families.spec import FamilySpec
from mmpeft.methods.lora import lora_config
from mmpeft.methods.plan import base_name


def get_peft_model(
    model: PreTrainedModel, train: Mapping[Any, Any], *, carried: Mapping[Part, PartTraining] | None = None
) -> PeftModel | PreTrainedModel:
    """Freeze a model and make the parts of `train` trainable.

        {"projector": "full"}                                  PeftModel, projector as `modules_to_save`
        {"projector": "full", "language": {"r": 16}}           PeftModel, LoRA on the language model beside it
        {"language": "full"}                                   the model itself: its own weights train

    Args:
        model: a transformers model of a known family.
        train: `vision`, `projector` and `language`, each `full`, `frozen` or fields of `peft.LoraConfig`.
        carried: how earlier stages trained parts that `train` leaves alone; those stay in the adapter, frozen,
            so that one adapter holds the work of every stage.

    Returns:
        An ordinary `PeftModel`; the plain model when a tower is `full`, since its weights then change in
        place and are written as a model directory. LoRA cannot be combined with a `full` tower.

    Raises:
        RecipeError: the block is wrong, matches nothing, or cannot be expressed as one adapter.
        ModelError: the model belongs to no family.
    """
    parts = check_train(train)
    if isinstance(model, PeftModel):
        raise RecipeError("the model has an adapter already; pass its base: peft_model.get_base_model()")
    spec = family_of(model)
    for part in PARTS:
        if parts[part] != "frozen":
            _check_part_exists(model, spec, part)
    if trains_tower(parts):
        return _train_in_place(model, spec, parts)
    held: dict[Part, PartTraining] = {
        part: parts[part] if parts[part] != "frozen" else (carried or {}).get(part, "frozen") for part in PARTS
    }
    saved = spec.projector_leaves(model, spec) if held["projector"] == "full" else []
    peft_model = peft.get_peft_model(model, lora_config(model, spec, held, saved=saved))
    freeze_carried(peft_model, parts)
    _check_trainable(peft_model, parts)
    _in_full_precision(peft_model)
    return peft_model


def _in_full_precision(model: nn.Module) -> None:
    """Trainable weights in float32: an update of 1e-4 is lost in bfloat16's 8 bits of mantissa."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def freeze_carried(peft_model: PeftModel, train: Mapping[Part, PartTraining]) -> None:
    """Take the gradients from every part that `train` does not name; PEFT switches on all that it holds."""
    spec = family_of(peft_model)
    for name, parameter in peft_model.named_parameters():
        part = spec.part_of(base_name(name))
        if part is None or train.get(part, "frozen") == "frozen":
            parameter.requires_grad_(False)


def trains_tower(train: Mapping[Part, PartTraining]) -> bool:
    """Whether a tower's own weights train, so that the stage writes a model directory, not an adapter."""
    return any(train.get(part) == "full" for part in ("vision", "language"))


def _check_part_exists(model: PreTrainedModel, spec: FamilySpec, part: Part) -> None:
    names = [name for name, _ in model.named_parameters()]
    if not any(spec.part_of(name) == part for name in names):
        tops = sorted({".".join(name.split(".")[:2]) for name in names})
        raise RecipeError(
            f"train.{part}: not one parameter of {type(model).__name__} matched "
            f"{', '.join(spec.parts[part])}; the model has: {', '.join(tops)}"
        )


def _train_in_place(model: PreTrainedModel, spec: FamilySpec, parts: Mapping[Part, PartTraining]) -> PreTrainedModel:
    mixed = [part for part in PARTS if isinstance(parts[part], dict)]
    if mixed:
        full = [part for part in PARTS if parts[part] == "full"]
        raise RecipeError(
            f"train: {', '.join(full)} is `full` and {', '.join(mixed)} has LoRA; a stage writes either a model or "
            "an adapter: put them in two stages"
        )
    fixed = set(_leaf_parameters(model, spec))
    for name, parameter in model.named_parameters():
        part = spec.part_of(name)
        trains = part is not None and parts[part] == "full" and (part != "projector" or name in fixed)
        parameter.requires_grad_(trains)
    _in_full_precision(model)
    return model


def _leaf_parameters(model: PreTrainedModel, spec: FamilySpec) -> list[str]:
    return [
        f"{leaf}.{name}"
        for leaf in spec.projector_leaves(model, spec)
        for name, _ in model.get_submodule(leaf).named_parameters()
    ]


def _check_trainable(peft_model: PeftModel, parts: Mapping[Part, PartTraining]) -> None:
    """PEFT has matched what was asked: no part that trains is left without a parameter."""
    spec = family_of(peft_model)
    reached = {
        spec.part_of(base_name(name)) for name, parameter in peft_model.named_parameters() if parameter.requires_grad
    }
    for part, training in parts.items():
        if training != "frozen" and part not in reached:
            names = sorted({re.sub(r"\.\d+\.", ".N.", name) for name, _ in peft_model.get_base_model().named_modules()})
            raise RecipeError(
                f"train.{part}: PEFT matched no parameter of this part{did_you_mean(spec.parts[part][0], names)}"
            )
