"""A model as ONNX graphs, one a part, in int8, float16 or float32.

    base + adapter -> merged, in memory, in float32 -> each part traced -> weights in int8 -> whole directory

transformers' `OnnxExporter` traces and translates, ONNX Runtime's block quantizer makes int8 of the weights of matrix
products. Ours are which parts there are, the embedding in int8, the tower of Qwen2.5-VL, and float16 on disk.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.exporters.configs import OnnxConfig

from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.core.files import write_json
from mmpeft.core.optional import require
from mmpeft.export.artefact import ONNX, artefact
from mmpeft.export.merge import MergedModel
from mmpeft.export.onnx_graph import EXTRA, check_installed
from mmpeft.export.onnx_model import MANIFEST
from mmpeft.export.onnx_parts import (
    DECODER,
    EMBEDDING,
    HEAD,
    VISION,
    Part,
    is_tied,
    language_parts,
    tied_embedding,
)
from mmpeft.export.onnx_vision import vision_of
from mmpeft.export.sources import Source, write_companions
from mmpeft.families.registry import family_of
from mmpeft.models.load import load_model

Precision = Literal["int8", "fp16", "fp32"]

INLINE_BYTES = 3 * 2**29
"""Bytes of weights up to which a graph is one file; protobuf ends at 2 GB."""

_BLOCKS = (128, 64)
"""Weights, and activations, that share a scale, what is faster first. ONNX Runtime's dynamic quantization has one for
all activations of a prompt: on the first five layers of SmolLM2-135M outputs were 20 % off with it, 3 % with 128."""

_ATTENTION_OPSET = 23
"""The first with an operator for attention."""

_INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits: activations in int8 as they come."""


@dataclass(frozen=True, kw_only=True)
class OnnxSettings:
    """What is written how.

    Attributes:
        precision: of weights: int8 with activations in int8 as they come; fp16 on disk and float32 in sums; fp32.
        include: parts to quantize beside the language model; "vision" costs accuracy.
    """

    precision: Precision = "int8"
    include: tuple[Literal["vision"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class OnnxResult:
    """What was written.

    Attributes:
        output: the model's directory.
        graphs: by part the bytes of its graph with its weights.
        before: bytes of the source's weights in the precision that they have there.
    """

    output: Path
    graphs: Mapping[str, int]
    before: int

    @property
    def bytes(self) -> int:
        """Of all graphs."""
        return sum(self.graphs.values())


def merged_in_memory(source: Source) -> Any:
    """The source's model in float32 on the CPU, its adapter merged.

    Raises:
        AdapterError: the adapter does not fit the base.
        ModelError: the base is not whole, quantized, or has weights that are NaN or infinite.
    """
    # Refuses what does not fit, by names, shapes and what is recorded.
    MergedModel(source.base, source.adapter).check_unquantized()
    model: Any = load_model(source.base, adapter=source.adapter, device="cpu", dtype="float32")[0]
    model = model.merge_and_unload() if hasattr(model, "peft_config") else model
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"{source.name}: {name} has weights that are NaN or infinite; train or fetch it again")
    return model.eval()


def write_onnx(source: Source, model: Any, output: str | Path, settings: OnnxSettings | None = None) -> OnnxResult:
    """Write the directory.

    Args:
        source: what the model is of.
        model: of `merged_in_memory`.
        output: a new or empty directory, or an earlier export, which is replaced.
        settings: what is written how.

    Raises:
        MissingDependencyError: a library of the extra `onnx` is not installed.
        ModelError: a family or a language model that cannot be exported.
        OutputError: the output holds something else, has no room, or cannot be written; it is then as it was.
        RecipeError: `settings` name what is not there.
    """
    check_installed()
    settings = settings or OnnxSettings()
    unknown = sorted(set(settings.include) - {VISION})
    if unknown or (settings.include and settings.precision != "int8"):
        raise RecipeError(f"include: found {', '.join(settings.include)}; expected vision, and that in int8 alone")
    int8, family = settings.precision == "int8", family_of(model).name
    parts = [vision_of(family).part(model), *language_parts(model, int8=int8)]
    quantized = {DECODER, HEAD, *settings.include} if int8 else set()
    facts = source.own_facts
    facts |= {
        "base_model": source.base_name,
        "merged_adapter": None if source.adapter is None else source.name,
        "onnx": vars(settings),
    }
    weights = sum(weight.nbytes for weight in model.parameters())
    halved = {"int8": {VISION} - quantized, "fp16": {EMBEDDING, DECODER, HEAD, VISION}, "fp32": set()}
    sizes = {}
    with artefact(output, kind=ONNX, needs=weights, sources=source.folders, facts=facts) as out:
        write_companions(source, out.folder)
        _without_code(out.folder)
        tied = int8 and is_tied(model)
        for part in parts:
            graph = trace(part, quantize=part.name in quantized)
            if part.name in halved[settings.precision]:
                _halve(graph)
            sizes[part.name] = _save(graph, out.folder / f"{part.name}.onnx", beside=tied and part.name == HEAD)
        if tied:
            sizes[EMBEDDING] = _save_tied(out.folder, model.config.get_text_config().hidden_size)
        files = {name: f"{name}.onnx" for name in sizes}
        write_json(
            out.folder / MANIFEST, {"family": family, "precision": settings.precision, "graphs": files, "version": 1}
        )
    return OnnxResult(output=Path(output), graphs=sizes, before=_source_bytes(source, weights))


def trace(part: Part, *, quantize: bool) -> Any:
    """A part as an `onnx_ir.Model`.

    Args:
        quantize: make int8 of the weights of its matrix products, with a scale for 128 of them.
    """
    exporter = require("transformers.exporters.exporter_onnx", extra=EXTRA)
    decoder = part.name == DECODER
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=_automatic(part.varying),
        opset_version=_ATTENTION_OPSET if decoder else None,
        ort_fusions="cpu" if decoder else None,
    )
    with _quiet():
        graph = exporter.OnnxExporter().export_program(part.module.eval(), dict(part.inputs), config)[0]
        return _quantized(graph) if quantize else graph


def _quantized(graph: Any) -> Any:
    ir = require("onnx_ir", extra=EXTRA)
    kind = require("onnxruntime.quantization.matmul_nbits_quantizer", extra=EXTRA).MatMulNBitsQuantizer
    for block, names in _by_block(graph).items():
        proto = ir.to_proto(graph)
        quantizer = kind(
            proto,
            bits=8,
            block_size=block,
            is_symmetric=True,
            accuracy_level=_INT8_ACTIVATIONS,
            nodes_to_include=names,
        )
        quantizer.process()
        graph = ir.from_proto(quantizer.model.model)
    return graph


def _by_block(graph: Any) -> dict[int, list[str]]:
    """Names of matrix products by how many of their weights share a scale: so many as leave no block half empty."""
    found: dict[int, list[str]] = {}
    for node in graph.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
            continue
        channels = int(weight.const_value.shape[0])
        block = next((each for each in _BLOCKS if channels % each == 0), _BLOCKS[0])
        found.setdefault(block, []).append(node.name)
    return found


def _automatic(varying: Any) -> Any:
    """Numbers of dimensions as torch wants them: each to be found out in the trace, all others fixed."""
    if isinstance(varying, Mapping):
        return {name: _automatic(each) for name, each in varying.items()}
    if isinstance(varying, list):
        return [_automatic(each) for each in varying]
    return dict.fromkeys(varying, torch.export.Dim.AUTO)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of three libraries on progress, versions and signatures, which nobody can act on."""
    loggers = [logging.getLogger(name) for name in ("transformers.exporters", "torch.onnx", "onnxscript", "root", "")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _halve(graph: Any) -> None:
    """Store float32 weights in float16; a cast behind each, which ONNX Runtime does once, gives float32 back."""
    ir = require("onnx_ir", extra=EXTRA)
    for name, value in list(graph.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 2:
            continue
        half = torch.from_numpy(tensor.numpy().copy()).to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            continue
        stored = ir.Value(name=f"{name}_fp16", const_value=ir.tensor(half.numpy(), name=f"{name}_fp16"))
        stored.dtype, stored.shape = ir.DataType.FLOAT16, value.shape
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value})
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        value.replace_all_uses_with(cast.outputs[0])
        graph.graph.initializers.pop(name)
        cast.outputs[0].name = name
        graph.graph.register_initializer(stored)
        graph.graph.insert_before(graph.graph[0], cast)


def _save(graph: Any, file: Path, *, beside: bool = False) -> int:
    """Write a graph; bytes of all.

    Args:
        beside: write its weights beside it, as is done where they are too many for one file.
    """
    ir = require("onnx_ir", extra=EXTRA)
    weights = sum(each.const_value.nbytes for each in graph.graph.initializers.values() if each.const_value is not None)
    data = file.with_name(f"{file.name}.data")
    apart = {"external_data": data.name, **({"size_threshold_bytes": 0} if beside else {})}
    ir.save(graph, str(file), **(apart if beside or weights > INLINE_BYTES else {}))
    return file.stat().st_size + (data.stat().st_size if data.exists() else 0)


def _save_tied(folder: Path, channels: int) -> int:
    """Write the embedding of a head that is written already: a graph that reads the head's weights where they lie."""
    ir = require("onnx_ir", extra=EXTRA)
    head = ir.load(str(folder / f"{HEAD}.onnx")).graph
    product = next(node for node in head if node.op_type == "MatMulNBits")
    stored = {each.const_value.dtype: each.const_value for each in product.inputs[1:3]}
    words, blocks, block = map(int, stored[ir.DataType.UINT8].shape)
    shapes = {ir.DataType.UINT8: (words, blocks, block), ir.DataType.FLOAT: (words, blocks)}
    graph = trace(tied_embedding(words, blocks, block, channels), quantize=False)
    for name, value in graph.graph.initializers.items():
        place = stored.get(value.const_value.dtype)
        if place is None or tuple(map(int, value.const_value.shape)) != shapes[value.const_value.dtype]:
            continue
        value.const_value = ir.ExternalTensor(
            place.location, place.offset, place.length, place.dtype, shape=value.shape, name=name, base_dir=str(folder)
        )
    return _save(graph, folder / f"{EMBEDDING}.onnx")


def _without_code(folder: Path) -> None:
    """An ONNX export has no use for a model's own code: its graphs are all of it."""
    for file in folder.glob("*.py"):
        file.unlink()


def _source_bytes(source: Source, weights: int) -> int:
    files = [file.stat().st_size for file in source.base.glob("*.safetensors")]
    return sum(files) or weights
