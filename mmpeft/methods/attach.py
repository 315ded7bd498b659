"""Adapters on a model: `get_peft_model`, the one place where `requires_grad` is decided."""

import re
from collections.abc import Mapping
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from mmpeft.config.names import did_you_mean
from mmpeft.config.train import PartTraining, changes_base, check_train
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part
from mmpeft.families.registry import family_of, trained_model
from mmpeft.families.spec import FamilySpec
from mmpeft.methods.lora import lora_config
from mmpeft.methods.plan import base_name
from mmpeft.methods.readable import stored_modules
from mmpeft.models.base import quantized_as


def get_peft_model(
    model: PreTrainedModel, train: Mapping[Any, Any], *, carried: Mapping[Part, PartTraining] | None = None
) -> PeftModel | PreTrainedModel:
    """Freeze a model and make the parts of `train` trainable.

        {"projector": "full"}                                  PeftModel, projector as `modules_to_save`
        {"projector": "full", "language": {"r": 16}}           PeftModel, LoRA on the language model beside it
        {"language": "full"}                                   the model itself: its own weights train

    Args:
        model: a transformers model of a known family; of a whole omni model the thinker is trained, in place.
        train: `vision`, `audio`, `projector` and `language`, each `full`, `frozen` or fields of `peft.LoraConfig`.
        carried: how earlier stages trained parts that `train` leaves alone; those stay in the adapter, frozen,
            so that one adapter holds the work of every stage.

    Returns:
        An ordinary `PeftModel`; the plain model when a tower is `full`, since its weights then change in
        place and are written as a model directory. LoRA cannot be combined with a `full` tower.

    Raises:
        RecipeError: the block is wrong, matches nothing, cannot be expressed as one adapter, or as one that PEFT
            reads back.
        ModelError: the model belongs to no family.
    """
    parts = check_train(train)
    if isinstance(model, PeftModel):
        raise RecipeError("the model has an adapter already; pass its base: peft_model.get_base_model()")
    model = trained_model(model)
    spec = family_of(model)
    for part in PARTS:
        if parts[part] != "frozen":
            _check_part_exists(model, spec, part)
    if trains_tower(parts):
        return _train_in_place(model, spec, parts)
    held = _held(parts, carried or {})
    check_carried(parts, carried or {})
    saved = spec.projector_leaves(model, spec) if held["projector"] == "full" else []
    peft_model = _attach(model, lora_config(model, spec, held, saved=saved))
    freeze_carried(peft_model, parts)
    _check_trainable(peft_model, parts)
    stored_modules(peft_model)  # Refuses what PEFT would not read back.
    _in_full_precision(peft_model)
    return peft_model


def _held(train: Mapping[Part, PartTraining], carried: Mapping[Part, PartTraining]) -> dict[Part, PartTraining]:
    """How each part stands in the adapter: as it trains now, else as an earlier stage trained it.

    Dropout is of no account where nothing trains, and an adapter has one value of it: that of the parts that do.
    """
    training = [fields for fields in train.values() if isinstance(fields, dict)]
    dropout = {"lora_dropout": training[0]["lora_dropout"]} if training and "lora_dropout" in training[0] else {}
    held: dict[Part, PartTraining] = {}
    for part in PARTS:
        form = train[part] if train[part] != "frozen" else carried.get(part, "frozen")
        if train[part] == "frozen" and isinstance(form, dict):
            form = {key: value for key, value in form.items() if key != "lora_dropout"} | dropout
        held[part] = form
    return held


def _attach(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    try:
        return cast(PeftModel, peft.get_peft_model(model, config))
    except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError, RuntimeError) as error:
        raise RecipeError(
            f"train: peft cannot attach this adapter to {type(model).__name__}: {' '.join(str(error).split())[:400]}"
        ) from error


def check_carried(train: Mapping[Part, PartTraining], carried: Mapping[Part, PartTraining]) -> None:
    """What an earlier stage trained and this one trains further has to have one form, or its work would be changed.

    Raises:
        RecipeError: the part was trained another way, or its LoRA has another rank, scale or kind.
    """
    if trains_tower(train):
        return
    for part, before in carried.items():
        now = train.get(part, "frozen")
        if "frozen" in (now, before) or now == before == "full":
            continue
        if isinstance(now, str) or isinstance(before, str):
            raise RecipeError(
                f"train.{part}: an earlier stage trained it {_form(before)}, this one {_form(now)}; one adapter cannot "
                "hold both: train it the same way in both stages"
            )
        if changes_base(now):
            raise RecipeError(
                f"train.{part}.init_lora_weights: {now['init_lora_weights']!r} begins anew, but an earlier stage has "
                f"trained this LoRA; leave it out, and give {_fields(before)}"
            )
        for key, default in _CARRIED_FORM.items():
            if now.get(key, default) != before.get(key, default):
                raise RecipeError(
                    f"train.{part}.{key}: {now.get(key, default)!r} differs from {before.get(key, default)!r}, which "
                    f"the LoRA of an earlier stage has and has to keep; give {_fields(before)}"
                )


_CARRIED_FORM = {"r": 8, "lora_alpha": 8, "use_rslora": False, "use_dora": False}
"""Fields of `peft.LoraConfig` that say what its matrices mean, with their defaults."""


def _form(training: PartTraining) -> str:
    return "by LoRA" if isinstance(training, dict) else f"`{training}`"


def _fields(before: Mapping[str, Any]) -> str:
    """`r = 8, lora_alpha = 16` and what else says the form of a LoRA."""
    return ", ".join(
        f"{key} = {before.get(key, default)!r}"
        for key, default in _CARRIED_FORM.items()
        if key in ("r", "lora_alpha") or before.get(key, default) != default
    )


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
    return any(train.get(part) == "full" for part in PARTS if part != "projector")


def _check_part_exists(model: PreTrainedModel, spec: FamilySpec, part: Part) -> None:
    names = [name for name, _ in model.named_parameters()]
    if not any(spec.part_of(name) == part for name in names):
        tops = sorted({".".join(name.split(".")[:2]) for name in names})
        raise RecipeError(
            f"train.{part}: not one parameter of {type(model).__name__} matched "
            f"{', '.join(spec.parts.get(part, ())) or 'it (the family has no such part)'}; "
            f"the model has: {', '.join(tops)}"
        )


def _train_in_place(model: PreTrainedModel, spec: FamilySpec, parts: Mapping[Part, PartTraining]) -> PreTrainedModel:
    mixed = [part for part in PARTS if isinstance(parts[part], dict)]
    if method := quantized_as(model.config):
        raise RecipeError(
            f"train: a tower or the language model is `full`, and the model's weights are quantized ({method}); train "
            "the model that it was made from, or an adapter"
        )
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
            path = next(iter(spec.parts.get(part, ())), part)
            raise RecipeError(f"train.{part}: PEFT matched no parameter of this part{did_you_mean(path, names)}")
