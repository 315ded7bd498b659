"""A frozen language model in 8 or 4 bits, for LoRA on bases that are too large otherwise, by bitsandbytes.

    int8    LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339)
    nf4     QLoRA (Dettmers et al. 2023, arXiv:2305.14314)

Weights of the matrices in the language model's layers are so; towers, projector, embeddings, head and whatever trains
keep the precision that they have without.
"""

import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from mmpeft.core.errors import ModelError
from mmpeft.core.optional import require
from mmpeft.families.registry import trained_model

logger = logging.getLogger(__name__)

Quantization = Literal["int8", "nf4"]

_NF4_BLOCK = 64
"""Weights that share a scale; a row of so many, or bitsandbytes cannot run it on a CPU."""

_NF4_BYTES = 0.5 + 4 / _NF4_BLOCK
"""Of a weight, with its share of a scale."""


def quantization_config(skeleton: Any, kind: Quantization, *, dtype: torch.dtype | None) -> BitsAndBytesConfig:
    """What transformers reads a model by.

    Args:
        skeleton: the model on the meta device.
        dtype: of products; default: bfloat16.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        ModelError: there is nothing to quantize.
    """
    require("bitsandbytes", extra="quant")
    chosen = quantizable(skeleton, kind)
    if not chosen:
        raise ModelError(
            f"quantization: {kind}: {type(skeleton).__name__}'s language model has no matrix that bitsandbytes can "
            "hold; leave it out"
        )
    left = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear) and name not in chosen]
    logger.info("%d matrices of the language model are read in %s", len(chosen), kind)
    if uneven := len(quantizable(skeleton, "int8")) - len(chosen):
        logger.warning(
            "%d matrices of the language model stay whole: their rows are no multiple of %d, which nf4 needs",
            uneven,
            _NF4_BLOCK,
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype or torch.bfloat16,
        llm_int8_skip_modules=left,
    )


def quantizable(model: Any, kind: Quantization) -> set[str]:
    """Names of the matrices in the layers of a model's language model."""
    layers = getattr(trained_model(model).get_decoder(), "layers", None)
    inside = set(layers.modules()) if isinstance(layers, nn.Module) else set()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module in inside
        and (kind == "int8" or module.in_features % _NF4_BLOCK == 0)
    }


def spared_bytes(model: Any, kind: Quantization, dtype: torch.dtype) -> int:
    """What a model in `dtype` takes less memory by.

    Args:
        model: a plain one, on any device.
    """
    bits = _NF4_BYTES if kind == "nf4" else 1.0
    weights = sum(model.get_submodule(name).weight.numel() for name in quantizable(model, kind))
    return round(weights * (dtype.itemsize - bits))


def made_trainable(model: Any) -> None:
    """Let backward go through a model's packed weights, and these tell how many they are."""
    linears: list[Any] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for module in linears:
        if type(module).__module__.startswith("bitsandbytes"):
            module.weight.whole_numel = module.in_features * module.out_features
            # On a CPU, bitsandbytes 0.50 packs four bits anew at the first answer, in a way that has no gradient.
            module.support_avx512bf16_for_cpu = False
