"""Whether PEFT can read back the adapter that it writes."""

import torch
from peft import PeftModel
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

from mmpeft.core.errors import RecipeError


def check_readable(model: PeftModel) -> None:
    r"""Refuse an adapter whose LoRA would be left out without a word when it is loaded.

    While it loads an adapter, peft 0.21 renames its tensors by the rules that transformers has for old checkpoints of
    the base model. Where a rule also matches a name of today (`(^|model\.)layers\.` in
    `model.language_model.layers.0`), the tensor finds no place, and `load_state_dict(strict=False)` says nothing.

    Raises:
        RecipeError: tensors of this adapter would be lost.
    """
    names = {
        name.replace(".default", ""): torch.empty_like(weight, device="meta")
        for name, weight in model.named_parameters()
        if ".lora_" in name
    }
    lost = sorted(set(names) - set(_as_loaded(model, names)))
    if lost:
        renamed = next(iter(_as_loaded(model, {lost[0]: names[lost[0]]})))
        modules = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in lost})
        raise RecipeError(
            f"train: peft would not find {len(lost)} of the {len(names)} LoRA matrices when it loads them again: "
            f"it renames {lost[0]} to {renamed}, by transformers' rules for old checkpoints of model type "
            f"{model.config.model_type!r}; leave the modules out by `exclude_modules` (they end in "
            f"{', '.join(modules)}), or train the projector alone"
        )


def _as_loaded(model: PeftModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by the names under which PEFT will look for their places."""
    return convert_peft_adapter_state_dict_for_transformers(
        model=model, peft_config=model.peft_config["default"], adapter_state_dict=state
    )
