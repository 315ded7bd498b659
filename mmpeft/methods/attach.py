"""Adapters on a model: `get_peft_model`, the one place where `requires_grad` is decided."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import peft
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from mmpeft.config.names import did_you_mean
from mmpeft.config.train import PartTraining, check_train
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part
from mmpeft.families.registry import family_of
from mmpeft.families.spec import FamilySpec
from mmpeft.methods.lora import lora_config

logger = logging.getLogger(__name__)


def get_peft_model(
    model: PreTrainedModel, train: Mapping[str, Any], *, carried: tuple[Part, ...] = ()
) -> PeftModel | PreTrainedModel:
    """Freeze a model and make the parts of `train` trainable.

        {"projector": "full"}                                  PeftModel, projector as `modules_to_save`
        {"projector": "full", "language": {"r": 16}}           PeftModel, LoRA on the language model beside it
        {"language": "full"}                                   the model itself: its own weights train

    Args:
        model: a transformers model of a known family.
        train: `vision`, `projector` and `language`, each `full`, `frozen` or fields of `peft.LoraConfig`.
        carried: parts that an earlier stage trained by projector weights; they stay in the adapter, frozen.

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
        if parts[part] != "frozen" or part in carried:
            _check_part_exists(model, spec, part)
    if trains_tower(parts):
        return _train_in_place(model, spec, parts)
    saved = spec.projector_leaves(model, spec) if parts["projector"] == "full" or "projector" in carried else []
    config = lora_config(model, spec, parts, saved=saved)
    reference = _base_dtypes(model)
    peft_model = peft.get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and ".modules_to_save." in name:
            parameter.requires_grad_(parts["projector"] == "full")
    _check_trainable(peft_model, parts)
    _log_dtypes(peft_model, reference)
    return peft_model


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


def _train_in_place(
    model: PreTrainedModel, spec: FamilySpec, parts: Mapping[Part, PartTraining]
) -> PreTrainedModel:
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
        spec.part_of(name.removeprefix("base_model.model."))
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    for part, training in parts.items():
        if training != "frozen" and part not in reached:
            names = sorted({re.sub(r"\.\d+\.", ".N.", name) for name, _ in peft_model.get_base_model().named_modules()})
            raise RecipeError(
                f"train.{part}: PEFT matched no parameter of this part{did_you_mean(spec.parts[part][0], names)}"
            )


def _base_dtypes(model: PreTrainedModel) -> torch.dtype:
    return next(model.parameters()).dtype


def _log_dtypes(peft_model: PeftModel, base: torch.dtype) -> None:
    trainable = {parameter.dtype for parameter in peft_model.parameters() if parameter.requires_grad}
    if trainable != {base}:
        logger.info("base weights are %s, trainable weights %s", base, ", ".join(map(str, trainable)))
