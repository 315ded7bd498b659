"""LoRA on the experts of mixture-of-experts layers, which are one parameter of three dimensions, not linear layers.

layers.1.mlp
|- gate                            the router
|- experts
|  |- gate_up_proj  [experts, 2 x intermediate, hidden]   <- target_parameters: [experts.gate_up_proj,
|  '- down_proj     [experts, hidden, intermediate]                             experts.down_proj]
'- shared_expert.up_proj ...       linear layers, as target_modules names them
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from mmpeft.config.train import changes_base
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import Part
from mmpeft.families.spec import FamilySpec

_UNFIT = {"lora_dropout": 0.0, "use_dora": False, "lora_bias": False}
"""Fields that PEFT cannot carry out on a parameter, with the value that they have to keep."""


def parameter_names(model: nn.Module, spec: FamilySpec, part: Part, fields: Mapping[str, Any]) -> list[str]:
    """Full names of the parameters of one part that `target_parameters` asks for, by the endings of their names.

    Full names, since PEFT matches endings in the whole model, which would reach other towers too.

    Raises:
        RecipeError: an ending matches nothing in the part, or a field does not go with LoRA on parameters.
    """
    wanted = fields.get("target_parameters")
    if not wanted:
        return []
    if isinstance(wanted, str):
        raise RecipeError(f"train.{part}.target_parameters: found {wanted!r}; expected a list, as [{wanted}]")
    _check_fields(part, fields)
    stacked = [name for name, weight in model.named_parameters() if weight.dim() == 3 and spec.part_of(name) == part]
    for want in wanted:
        if not any(_ends(name, want) for name in stacked):
            endings = sorted({".".join(name.split(".")[-2:]) for name in stacked})
            has = f"it has: {', '.join(endings)}" if endings else "it has none, so no experts"
            raise RecipeError(
                f"train.{part}.target_parameters: no parameter of three dimensions in the {part} part ends in {want!r} "
                f"({has}); linear layers are named in target_modules"
            )
    return [name for name in stacked if any(_ends(name, want) for want in wanted)]


def rewritten_leaves(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Last names among `names` that PEFT does not take as modules of this model, but as a word for its experts.

    For some model types peft 0.21 turns a LoRA on `gate_proj`, `up_proj` or `down_proj`, wherever these lie, into one
    on all experts, as adapters had it that were trained when each expert was a linear layer of its own.
    """
    return {
        leaf
        for leaf in {name.rpartition(".")[2] for name in names}
        if (converted := _as_attached(model, [leaf])) is None or leaf not in (converted.target_modules or ())
    }


def keeps_pattern(model: nn.Module, pattern: str) -> bool:
    """Whether PEFT matches a regular expression in this model as it stands.

    For the same model types it replaces one by the last names of what it matches, which reach every tower.
    """
    converted = _as_attached(model, pattern)
    return converted is not None and converted.target_modules == pattern


def _as_attached(model: nn.Module, targets: str | list[str]) -> LoraConfig | None:
    """What PEFT makes of `target_modules` when it attaches an adapter; None where it refuses them."""
    config = LoraConfig(target_modules=copy.copy(targets))
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return None
    return config


def _check_fields(part: Part, fields: Mapping[str, Any]) -> None:
    for key, value in _UNFIT.items():
        if fields.get(key, value) != value:
            raise RecipeError(
                f"train.{part}.{key}: {fields[key]!r} does not go with target_parameters: peft applies LoRA to experts "
                f"through their weights; give {value!r}, or leave target_parameters out"
            )
    if changes_base(fields):
        raise RecipeError(
            f"train.{part}.init_lora_weights: {fields['init_lora_weights']!r} decomposes linear layers, not the "
            "experts that target_parameters names; leave one of the two out"
        )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")
