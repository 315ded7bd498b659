"""An adapter's directory taken apart: what LoRA does to each module, and what is saved whole.

base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight  |  LoRA of the module
base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.weight  |  ...q_proj
base_model.model.model.multi_modal_projector.linear_1.weight                      saved whole
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key

from mmpeft.core.errors import AdapterError
from mmpeft.export.merge import all_finite
from mmpeft.methods.checkpoint import read_weights
from mmpeft.models.load import read_adapter_config, read_facts

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base's modules."""


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """What LoRA does to one module: it adds `scale * B @ A` to its weight.

    Attributes:
        a: [rank, inputs], or with the shape of a convolution's kernel behind.
        b: [outputs, rank].
        scale: `lora_alpha / rank`, with rsLoRA `lora_alpha / sqrt(rank)`.
        kind: `lora_` or, of an embedding, `lora_embedding_`.
        more: other tensors, by the ends of their names: DoRA's magnitudes, a bias of `b`.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    kind: str = "lora_"
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Rows of `a`."""
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter that has been read.

    Attributes:
        folder: its directory.
        config: content of adapter_config.json.
        facts: content of mmpeft.json; empty where there is none.
        lora: by the name of each module of the base, what LoRA does to it.
        whole: by its name in the base, each tensor that takes the place of the base's.
    """

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    lora: Mapping[str, LoraModule]
    whole: Mapping[str, torch.Tensor]


def read_config(folder: Path) -> dict[str, Any]:
    """Content of adapter_config.json.

    Raises:
        AdapterError: there is none, it is damaged, or not of a LoRA.
    """
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder / CONFIG_NAME}: an adapter of type {config.get('peft_type')!r}; only LORA is known here"
        )
    return config


def read_adapter(folder: str | Path) -> AdapterFiles:
    """An adapter's directory with all its tensors.

    Raises:
        AdapterError: not a whole adapter, a tensor in it has no partner, or is NaN or infinite.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights = read_weights(folder)
    check_finite(weights, folder)
    lora, whole = take_apart(weights, config, folder)
    return AdapterFiles(folder=folder, config=config, facts=read_facts(folder), lora=lora, whole=whole)


def check_finite(weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Refuse weights that are no numbers.

    Raises:
        AdapterError: names the first.
    """
    bad = next((name for name, tensor in weights.items() if not all_finite(tensor)), None)
    if bad is not None:
        raise AdapterError(f"{source}: {bad} has weights that are NaN or infinite; train or copy it again")


def take_apart(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: Path
) -> tuple[dict[str, LoraModule], dict[str, torch.Tensor]]:
    """LoRA by module, and what is saved whole, by names without PEFT's prefix.

    Raises:
        AdapterError: one of a LoRA's two matrices is lacking.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in weights.items():
        name = key.removeprefix(PREFIX)
        module, found, end = name.partition(".lora_")
        if found:
            # DoRA's magnitudes are stored by two names.
            end = end.replace("magnitude_vector.weight", "magnitude_vector")
            parts.setdefault(module, {})[f"lora_{end}"] = tensor
        elif ".original_module." not in name:
            whole[name] = tensor
    lora = {module: _lora_module(module, found, config, source) for module, found in parts.items()}
    return lora, whole


def _lora_module(module: str, parts: Mapping[str, torch.Tensor], config: Mapping[str, Any], source: Path) -> LoraModule:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    lacking = [name for name in names if name not in parts]
    if lacking:
        raise AdapterError(f"{source}: {module} has no {lacking[0]}; the adapter is not whole: train or copy it again")
    a, b = (parts[name] for name in names)
    return LoraModule(
        a=a,
        b=b,
        scale=scale_of(module, a.shape[0], config),
        kind="lora_embedding_" if embedding else "lora_",
        more={name: tensor for name, tensor in parts.items() if name not in names},
    )


def scale_of(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """The factor of a module's `B @ A`, by the rules of `peft.LoraConfig` with its patterns."""
    patterns = config.get("alpha_pattern") or {}
    key = get_pattern_key(list(patterns), module)
    alpha = patterns.get(key, config.get("lora_alpha", 8))
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def check_patterns(adapter: AdapterFiles) -> None:
    """Refuse patterns that name modules otherwise than the tensors do, for their scale would be taken for another.

    Raises:
        AdapterError: names the pattern.
    """
    for pattern in adapter.config.get("alpha_pattern") or {}:
        if not any(re.match(rf"(.*\.)?({pattern})$", module) for module in adapter.lora):
            raise AdapterError(
                f"{adapter.folder}: no tensor belongs to the module that alpha_pattern calls {pattern!r}, so its scale "
                "is not known; merge the adapter into its base instead"
            )
