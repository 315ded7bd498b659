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
from mmpeft.export.linears import matching
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
from mmpeft.export.onnx_weights import halve, quantized
from mmpeft.export.sources import Source, write_companions
from mmpeft.families.registry import family_of
from mmpeft.models.load import load_model

Precision = Literal["int8", "fp16", "fp32"]

INLINE_BYTES = 3 * 2**29
"""Bytes of weights up to which a graph is one file; protobuf ends at 2 GB."""

_ATTENTION_OPSET = 23
"""The first with an operator for attention."""


@dataclass(frozen=True, kw_only=True)
class OnnxSettings:
    """What is written how.

    Attributes:
        precision: of weights: int8 with activations in int8 as they come; fp16 on disk and float32 in sums; fp32.
        include: parts to quantize beside the language model; "vision" costs accuracy.
        skip: names of linear layers that stay in 16 bits, or `re:` and a pattern.
    """

    precision: Precision = "int8"
    include: tuple[Literal["vision"], ...] = ()
    skip: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuse parts that are not there, and layers or parts without int8.

        Raises:
            RecipeError: says what it found.
        """
        if set(self.include) - {VISION} or (self.include and self.precision != "int8"):
            raise RecipeError(f"include: found {', '.join(self.include)}; expected vision, and that in int8 alone")
        if self.skip and self.precision != "int8":
            raise RecipeError(f"skip: with precision {self.precision} no layer is in int8; leave --skip out")


@dataclass(frozen=True, kw_only=True)
class OnnxResult:
    """What was written.

    Attributes:
        output: the model's directory.
        graphs: by part the bytes of its graph with its weights.
        before: bytes of the source's weights in the precision that they have there.
        quantized: names of the linear layers that are in int8.
    """

    output: Path
    graphs: Mapping[str, int]
    before: int
    quantized: tuple[str, ...] = ()

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
    settings.check()
    int8, family = settings.precision == "int8", family_of(model).name
    chosen, left = int8_layers(model, settings) if int8 else ({}, {})
    tied = bool(int8 and is_tied(model) and HEAD in chosen.values())
    parts = [vision_of(family).part(model), *language_parts(model, int8=int8, tied=tied)]
    whole = {DECODER, HEAD, *settings.include} if int8 else set()
    facts = source.own_facts
    facts |= {
        "base_model": source.base_name,
        "merged_adapter": None if source.adapter is None else source.name,
        "onnx": vars(settings),
    }
    weights = sum(weight.nbytes for weight in model.parameters())
    halved = {"int8": {VISION} - whole, "fp16": {EMBEDDING, DECODER, HEAD, VISION}, "fp32": set()}
    sizes = {}
    with artefact(output, kind=ONNX, needs=weights, sources=source.folders, facts=facts) as out:
        write_companions(source, out.folder)
        _without_code(out.folder)
        for part in parts:
            graph = trace(part)
            if part.name in whole:
                spared = {name: model.get_submodule(name).weight for name, of in left.items() if of == part.name}
                with _quiet():
                    graph = quantized(graph, spared)
            if part.name in halved[settings.precision]:
                halve(graph)
            sizes[part.name] = _save(graph, out.folder / f"{part.name}.onnx", beside=tied and part.name == HEAD)
        if tied:
            sizes[EMBEDDING] = _save_tied(out.folder, model.config.get_text_config().hidden_size)
        files = {name: f"{name}.onnx" for name in sizes}
        write_json(
            out.folder / MANIFEST, {"family": family, "precision": settings.precision, "graphs": files, "version": 1}
        )
    return OnnxResult(output=Path(output), graphs=sizes, before=_source_bytes(source, weights), quantized=tuple(chosen))


def int8_layers(model: Any, settings: OnnxSettings) -> tuple[dict[str, str], dict[str, str]]:
    """The linear layers that are written in int8, and those that would be and are skipped; each with its graph.

    Raises:
        RecipeError: `settings` name what is not there.
    """
    inside, head, spec = set(model.get_decoder().modules()), model.get_output_embeddings(), family_of(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    places = {}
    for name, module in linears.items():
        if module in inside:
            places[name] = DECODER
        elif module is head:
            places[name] = HEAD
        elif VISION in settings.include and spec.part_of(name) in ("vision", "projector"):
            places[name] = VISION
    skipped = matching(settings.skip, linears)
    chosen = {name: place for name, place in places.items() if name not in skipped}
    return chosen, {name: place for name, place in places.items() if name in skipped}


def trace(part: Part) -> Any:
    """A part as an `onnx_ir.Model`."""
    exporter = require("transformers.exporters.exporter_onnx", extra=EXTRA)
    decoder = part.name == DECODER
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=_automatic(part.varying),
        opset_version=_ATTENTION_OPSET if decoder else None,
        ort_fusions="cpu" if decoder else None,
    )
    with _quiet():
        return exporter.OnnxExporter().export_program(part.module.eval(), dict(part.inputs), config)[0]


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
    graph = trace(tied_embedding(words, blocks, block, channels))
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
