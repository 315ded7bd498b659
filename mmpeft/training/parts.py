"""Optimizer groups with a learning rate by part of the model."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from mmpeft.core.errors import RecipeError
from mmpeft.core.types import Part
from mmpeft.families.registry import family_of
from mmpeft.methods.plan import base_name


def parameter_groups(
    model: nn.Module, rates: Mapping[Part, float], *, decay: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: one for each part that trains, with and without weight decay.

        [{"part": "projector", "lr": 2e-5, "weight_decay": 0.1, "params": [...]},
         {"part": "projector", "lr": 2e-5, "weight_decay": 0.0, "params": [...]}, ...]

    Args:
        decay: names of the parameters that weight decay applies to.

    Raises:
        RecipeError: a parameter trains whose part has no learning rate.
    """
    spec = family_of(model)
    groups: dict[tuple[Part, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = spec.part_of(base_name(name))
        if part is None or part not in rates:
            raise RecipeError(
                f"{name} trains, but there is no learning rate for its part ({part}); given: {dict(rates)}"
            )
        groups.setdefault((part, name in decay), []).append(parameter)
    return [
        {
            "part": part,
            "lr": rates[part],
            "weight_decay": weight_decay if decays else 0.0,
            "params": parameters,
        }
        for (part, decays), parameters in groups.items()
    ]


def rates_now(groups: list[dict[str, Any]], current: float) -> dict[Part, float]:
    """The learning rate of each part, given the first group's: a schedule scales all groups alike."""
    first = groups[0].get("initial_lr", groups[0]["lr"])
    factor = current / first if first else 0.0
    return {group["part"]: group.get("initial_lr", group["lr"]) * factor for group in groups if "part" in group}
