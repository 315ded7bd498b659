"""The language model's layers through torch.compile, one by one: they are alike, so one is compiled and all use it.

Rows differ in length from step to step: the length stays a variable, and no step compiles again. Attention over packed
rows is Python that follows the samples; it stays as it is, between a layer's two halves.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import Any

from mmpeft.models.base import base_of

TESTED = frozenset(
    {"llama", "mistral", "phi3", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_vl_text", "smollm3"}
)
"""Types of language models whose compiled layers were tested to give the same losses without compiling anew."""


def uncompilable(model: Any, device: str) -> str | None:
    """Why the layers of `model` cannot be compiled; None if they can."""
    if _layers(model) is None:
        return "no list of layers was found in the language model"
    text = base_of(model).config.get_text_config().model_type
    if text not in TESTED:
        return f"layers of type {text!r} were not tested with it"
    if device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "there is no C++ compiler; install g++, or name yours in CXX"
    return None


@contextlib.contextmanager
def layers_compiled(model: Any) -> Iterator[int]:
    """Run the language model's layers compiled; the first forward and backward take tens of seconds.

    Args:
        model: a transformers model, or a `PeftModel` around one, for which `uncompilable` found nothing.

    Yields:
        How many layers.
    """
    layers = list(_layers(model) or ())
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield len(layers)
    finally:
        for layer in layers:
            # What `compile` has set; PyTorch 2.13 has no method that takes it back.
            layer._compiled_call_impl = None


def layer_parameters(model: Any) -> int:
    """Parameters of all layers."""
    return sum(weight.numel() for layer in _layers(model) or () for weight in layer.parameters())


def layer_count(model: Any) -> int:
    """Layers of the language model; 0 where no list of them was found."""
    return len(_layers(model) or ())


def _layers(model: Any) -> Any:
    decoder = base_of(model).get_decoder()
    return getattr(decoder, "layers", None)
