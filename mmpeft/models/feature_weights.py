"""What decides the outputs of a model's frozen parts: their weights, and whether chance is in them."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmpeft.core.hashing import hash_value
from mmpeft.core.types import Part
from mmpeft.families.spec import FamilySpec

_BESIDE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "dtype",
        "output_attentions",
        "output_hidden_states",
        "text_config",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of a configuration on which no feature depends, or which the hash has from elsewhere."""


def weights_digest(base: Any, spec: FamilySpec, parts: Collection[Part]) -> bytes:
    """A digest of the weights of some parts, of their configuration, and of the version of transformers.

    Names are those of the model without an adapter, so that a part that an adapter holds whole, or was merged from one,
    counts as the same with the same numbers.
    """
    digest = hashlib.blake2b(digest_size=32)
    digest.update(hash_value([transformers.__version__, _settings(base.config.to_dict())]).encode())
    for name, tensor in sorted(_tensors(base, spec, parts).items()):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    for name, module in base.named_modules():
        if spec.part_of(name) in parts and isinstance(getattr(module, "scaling", None), dict):
            # LoRA that an earlier stage left on a frozen part.
            digest.update(repr((name, sorted(module.scaling.items()))).encode())
    return digest.digest()


def _tensors(base: nn.Module, spec: FamilySpec, parts: Collection[Part]) -> dict[str, torch.Tensor]:
    return {
        name.replace(".modules_to_save.default", "").replace(".base_layer", ""): tensor
        for name, tensor in base.state_dict(keep_vars=True).items()
        if spec.part_of(name) in parts and ".original_module." not in name
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _settings(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _BESIDE and not str(key).startswith("_attn")
    }


def first_random(base: Any, spec: FamilySpec, parts: Collection[Part]) -> str | None:
    """What in some parts is drawn anew in each step of training, as a clause; None if nothing is.

    Counts dropout of any kind by the rate that a module or its configuration states, and statistics of a batch.
    """
    for name, module in base.named_modules():
        if spec.part_of(name) not in parts or not name:
            continue
        if isinstance(module, _BatchNorm):
            return f"{name} takes its statistics from the batch"
        for key, rate in _rates(module):
            return f"{name} drops out ({key}={rate:g})"
    return None


def _rates(module: nn.Module) -> Iterator[tuple[str, float]]:
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        yield "p", module.p
    config = getattr(module, "config", None)
    stated = config.to_dict() if isinstance(module, transformers.PreTrainedModel) and config is not None else {}
    for key, rate in (*vars(module).items(), *stated.items()):
        if "drop" in key and isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0:
            yield key, rate
