r"""The names under which PEFT finds an adapter's tensors again.

While it loads an adapter, peft 0.21 renames its tensors by the rules that transformers has for old checkpoints of the
base model. Where a rule also matches a name of today, the tensor would find no place, and
`load_state_dict(strict=False)` would not say so:

    rule      (^|model\.)layers\.             ->  \1language_model.layers.
    today     model.language_model.layers.0   ->  model.language_model.language_model.layers.0     lost
    stored    model.layers.0                  ->  model.language_model.layers.0                    found

So such tensors are stored under the name that the rule turns into today's, as transformers stores the base model's.
"""

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from peft import PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mmpeft.core.errors import RecipeError

Value = TypeVar("Value")


def stored_modules(model: PeftModel) -> dict[str, str]:
    """By the name of each module whose LoRA is stored under another one, that name; empty for most models.

    Raises:
        RecipeError: PEFT would find some LoRA matrices under no name.
    """
    names = {
        name.replace(".default", ""): torch.empty_like(weight, device="meta")
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }
    lost = sorted(set(names) - set(_as_loaded(model, names)))
    stored = {name: _found_under(model, name, names[name]) for name in lost}
    hopeless = [name for name, other in stored.items() if other is None]
    if hopeless:
        renamed = next(iter(_as_loaded(model, {hopeless[0]: names[hopeless[0]]})))
        endings = sorted({_module(name).rpartition(".")[2] for name in hopeless})
        raise RecipeError(
            f"train: peft would not find {len(hopeless)} of the {len(names)} LoRA matrices when it loads them again: "
            f"it renames {hopeless[0]} to {renamed}, by transformers' rules for old checkpoints of model type "
            f"{model.config.model_type!r}; leave the modules out by `exclude_modules` (they end in "
            f"{', '.join(endings)}), or train the projector alone"
        )
    return {_module(name): _module(other) for name, other in stored.items() if other is not None}


def renamed(tensors: Mapping[str, Value], modules: Mapping[str, str]) -> dict[str, Value]:
    """The tensors of an adapter, those of LoRA on `modules` by their modules' other names."""
    return {
        modules.get(_module(name), _module(name)) + name.removeprefix(_module(name)): tensor
        for name, tensor in tensors.items()
    }


def _module(name: str) -> str:
    """What LoRA lies on; the whole name of a tensor that is none of LoRA's."""
    return name.partition(".lora_")[0]


def _found_under(model: PeftModel, name: str, tensor: torch.Tensor) -> str | None:
    """The name that PEFT turns into this one; None where no rule leads there."""
    for rule in get_model_conversion_mapping(cast(PreTrainedModel, model.get_base_model())):
        if type(rule) is WeightRenaming:
            other, _ = rule.reverse_transform().rename_source_key(name)
            if other != name and list(_as_loaded(model, {other: tensor})) == [name]:
                return str(other)
    return None


def _as_loaded(model: PeftModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by the names under which PEFT will look for their places."""
    return convert_peft_adapter_state_dict_for_transformers(
        model=model, peft_config=model.peft_config["default"], adapter_state_dict=state
    )
