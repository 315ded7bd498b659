"""What trains: for each part of a model its state, its parameters and its learning rate, before anything runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from mmpeft.core.types import PARTS, Part
from mmpeft.families.registry import family_of
from mmpeft.families.spec import FamilySpec

State = Literal["frozen", "full", "lora", "carried"]


@dataclass(frozen=True, kw_only=True)
class PartPlan:
    """One row of the table.

    Attributes:
        state: how the part is trained; `carried` is frozen now but was trained by an earlier stage.
        parameters: weights of the part in the base model.
        trainable: weights that get gradients.
        learning_rate: peak learning rate; None where nothing trains.
    """

    part: Part
    state: State
    parameters: int
    trainable: int
    learning_rate: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The whole table, in the order vision, audio, projector, language; parts that the family lacks are left out."""

    parts: tuple[PartPlan, ...]

    @property
    def trainable(self) -> int:
        """Weights that get gradients."""
        return sum(part.trainable for part in self.parts)

    @property
    def total(self) -> int:
        """Weights of the base model."""
        return sum(part.parameters for part in self.parts)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """`{part: {state, parameters, trainable, learning_rate}}`, as plan.json and mmpeft.json hold it."""
        return {
            row["part"]: {key: value for key, value in row.items() if key != "part"}
            for row in (asdict(part) for part in self.parts)
        }


def base_name(name: str) -> str:
    """A parameter's name in the base model, without what PEFT's wrappers put around it.

    base_model.model.lm_head.weight                                     -> lm_head.weight
    base_model.model.model.language_model.layers.0...q_proj.lora_A.default.weight
                                      -> model.language_model.layers.0...q_proj.lora_A.default.weight
    """
    return name.removeprefix("base_model.model.")


def describe_training(
    model: nn.Module, train: Mapping[Part, Any], learning_rate: float | Mapping[Part, float] | None = None
) -> TrainingPlan:
    """The plan of a model that `get_peft_model` has prepared.

    Args:
        model: a `PeftModel`, or a plain model whose `requires_grad` flags are set.
        train: the stage's `train` block.
        learning_rate: one rate for every part, or a rate by part.
    """
    spec = family_of(model)
    counts = _count(model, spec)
    rows = []
    for part in (part for part in PARTS if part in spec.parts):
        parameters, trainable, carried = counts[part]
        training = train.get(part, "frozen")
        state: State = training if training in ("full", "frozen") else "lora"
        if state == "frozen" and carried:
            state = "carried"
        rate = learning_rate.get(part) if isinstance(learning_rate, Mapping) else learning_rate
        rows.append(
            PartPlan(
                part=part,
                state=state,
                parameters=parameters,
                trainable=trainable,
                learning_rate=rate if trainable else None,
            )
        )
    return TrainingPlan(parts=tuple(rows))


def _count(model: nn.Module, spec: FamilySpec) -> dict[Part, tuple[int, int, bool]]:
    """Per part: weights of the base model, weights that train, whether an adapter holds any of it."""
    counts: dict[Part, tuple[int, int, bool]] = dict.fromkeys(PARTS, (0, 0, False))
    for name, parameter in model.named_parameters():
        part = spec.part_of(base_name(name))
        if part is None:
            continue
        base, trainable, adapted = counts[part]
        added = ".lora_" in name or ".modules_to_save." in name
        counts[part] = (
            base + (0 if added else _count_weights(parameter)),
            trainable + (_count_weights(parameter) if parameter.requires_grad else 0),
            adapted or added,
        )
    return counts


def _count_weights(parameter: nn.Parameter) -> int:
    """Also of one of which this process has a share, or, under ZeRO-3, nothing by itself."""
    found = getattr(parameter, "whole_numel", None) or getattr(parameter, "ds_numel", None)
    return int(found or parameter.numel())
