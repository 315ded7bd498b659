"""The weights of a graph's matrix products: in blocks of int8, in float16, or as they are."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from mmpeft.core.errors import ModelError
from mmpeft.core.optional import require
from mmpeft.export.onnx_graph import EXTRA

_BLOCKS = (128, 64)
"""Weights, and activations, that share a scale, what is faster first. ONNX Runtime's dynamic quantization has one for
all activations of a prompt: on the first five layers of SmolLM2-135M outputs were 20 % off with it, 3 % with 128."""

_INT8_ACTIVATIONS = 4
"""`accuracy_level` of MatMulNBits: activations in int8 as they come."""


def block_of(channels: int) -> int:
    """How many of a matrix product's weights share a scale: so many as leave no block half empty."""
    return next((each for each in _BLOCKS if channels % each == 0), _BLOCKS[0])


def quantized(graph: Any, left: Mapping[str, torch.Tensor]) -> Any:
    """A graph with int8 in the place of the weights of its matrix products.

    Args:
        graph: an `onnx_ir.Model`.
        left: by name [out, in] what is stored in float16 instead. Matrices that the graph has joined, such as those of
            queries, keys and values, are left together.

    Raises:
        ModelError: the graph has none of them.
    """
    ir = require("onnx_ir", extra=EXTRA)
    kind = require("onnxruntime.quantization.matmul_nbits_quantizer", extra=EXTRA).MatMulNBitsQuantizer
    _plain_products(graph)
    products = {node.name: node.inputs[1] for node in graph.graph if _is_product(node)}
    spared = _products_with(products, left)
    halve(graph, only={products[name].name for name in spared})
    blocks: dict[int, list[str]] = {}
    for name, weight in products.items():
        if name not in spared:
            blocks.setdefault(block_of(int(weight.const_value.shape[0])), []).append(name)
    for block, names in blocks.items():
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


def halve(graph: Any, *, only: Iterable[str] | None = None) -> None:
    """Store float32 weights in float16; a cast behind each, which ONNX Runtime does once, gives float32 back.

    Args:
        only: names of those; default: all.
    """
    ir = require("onnx_ir", extra=EXTRA)
    for name, value in list(graph.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 2:
            continue
        if only is not None and name not in only:
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


def _plain_products(graph: Any) -> None:
    """Make a `MatMul` of each `Gemm`, which linear layers on [rows, channels] become, and a sum with its bias."""
    ir = require("onnx_ir", extra=EXTRA)
    for node in [node for node in graph.graph if node.op_type == "Gemm"]:
        numbers = {name: each.value for name, each in node.attributes.items()}
        weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        scaled = any(numbers.get(name, 1.0) != 1.0 for name in ("alpha", "beta"))
        if weight is None or weight.const_value is None or scaled or numbers.get("transA"):
            continue
        if numbers.get("transB"):
            name = f"{weight.name}_columns"
            if name not in graph.graph.initializers:
                columns = np.ascontiguousarray(weight.const_value.numpy().T)
                turned = ir.Value(name=name, const_value=ir.tensor(columns, name=name))
                turned.dtype, turned.shape = ir.DataType.FLOAT, ir.Shape(columns.shape)
                graph.graph.register_initializer(turned)
            weight = graph.graph.initializers[name]
        made = [ir.node("MatMul", [node.inputs[0], weight], name=f"{node.name}_product")]
        if bias is not None:
            made.append(ir.node("Add", [made[0].outputs[0], bias], name=f"{node.name}_sum"))
        old, new = node.outputs[0], made[-1].outputs[0]
        new.dtype, new.shape = old.dtype, old.shape
        graph.graph.insert_before(node, made)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        name = old.name
        graph.graph.remove(node, safe=True)
        new.name = name
    for name, value in list(graph.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.graph.initializers.pop(name)


def _is_product(node: Any) -> bool:
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    return weight is not None and weight.const_value is not None and len(weight.const_value.shape) == 2


def _products_with(products: Mapping[str, Any], wanted: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the products that multiply by one of these matrices, alone or joined with others.

    The graph has names of its own, and fusions drop where in the model an operator came from: numbers tell.
    """
    found: set[str] = set()
    for weight in wanted.values():
        columns = weight.detach().float().numpy().T
        found.update(name for name, value in products.items() if _holds(value.const_value, columns))
    if wanted and not found:
        raise ModelError(f"skip: the graph has no matrix of {', '.join(wanted)}")
    return found


def _holds(tensor: Any, columns: np.ndarray) -> bool:
    rows, count = columns.shape
    if int(tensor.shape[0]) != rows or int(tensor.shape[1]) < count:
        return False
    whole = tensor.numpy()
    starts = np.flatnonzero(whole[0, : whole.shape[1] - count + 1] == columns[0, 0])
    return any(np.array_equal(whole[:, start : start + count], columns) for start in starts)
