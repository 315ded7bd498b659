"""What `mmpeft generate` and `mmpeft evaluate` ask: a model, an adapter on its base, or graphs for ONNX Runtime."""

import contextlib
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from mmpeft.core.errors import RecipeError
from mmpeft.export.onnx_model import MANIFEST, OnnxModel
from mmpeft.export.sources import check_single, result_of
from mmpeft.models.load import load_model
from mmpeft.models.quantized import Quantization


def open_model(
    name: str,
    *,
    adapter: str | None = None,
    device: str = "auto",
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The model of a directory or hub id, and its processor.

    Args:
        name: of a model, an adapter, the directory of a run, or of what `mmpeft export onnx` has written.
        adapter, device, quantization, trust_remote_code: as of `load_model`.

    Raises:
        ModelError, AdapterError: as of `load_model` and `OnnxModel`.
        RecipeError: an adapter or `quantization` for graphs, or another device than the CPU.
    """
    name = result_of(name)
    check_single(name)
    if not is_onnx(name):
        return load_model(
            name,
            adapter=adapter,
            device=device,
            quantization=quantization,
            trust_remote_code=trust_remote_code,
        )
    if adapter is not None:
        raise RecipeError(f"{name}: an ONNX export takes no adapter; export it anew: mmpeft export onnx {adapter} OUT")
    if quantization is not None:
        raise RecipeError(f"{name}: an ONNX export has its own precision; leave --quantization out")
    if device not in ("auto", "cpu"):
        raise RecipeError(f"{name}: an ONNX export answers on the CPU; device {device!r} is for models of torch")
    model = OnnxModel.from_pretrained(name)
    return model, model.processor


def is_onnx(name: str) -> bool:
    """Whether a directory or hub repository holds what `mmpeft export onnx` has written."""
    if Path(name).exists():
        return (Path(name) / MANIFEST).is_file()
    # A name that is none, or a Hub that cannot be reached: `load_model` says which.
    with contextlib.suppress(OSError, ValueError):
        return cached_file(name, MANIFEST, _raise_exceptions_for_missing_entries=False) is not None
    return False
