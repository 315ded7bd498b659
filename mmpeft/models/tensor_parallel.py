"""A language model whose matrices are shared out over a group of processes, all of which run the same samples.

    attention      q, k, v   by columns: each process has some of the heads      o      by rows
    feed-forward   gate, up  by columns                                          down   by rows

    x ── same in all ──> [ columns | columns ] ──> [ rows | rows ] ── sum over the group ──> same in all

With `tokens`, what lies between blocks is shared out as well (Korthikanti et al. 2022, arXiv:2205.05198): each process
has its part of every row, which is gathered before a block and summed into parts behind it. The last layer has whole
rows, of which its feed-forward part and the head may need but a few positions (`mmpeft.models.last_layer`).

Between the two matrices of a block nothing is sent. Each block sends its output once forward and its input's gradient
once backward (Shoeybi et al. 2019, arXiv:1909.08053); towers, projector, embeddings and the head are whole in every
process, and so are the two matrices of a LoRA, of which a process uses those rows or columns that go with its share.
What trains in a block has, in each process, the part of its gradient that comes from the share.

Which matrix is cut which way says transformers' `base_model_tp_plan`, and transformers reads each share from disk. Its
own forward sends the input's gradient once for each matrix, and PEFT's once more for each LoRA.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from mmpeft.core.errors import ModelError
from mmpeft.families.registry import trained_model
from mmpeft.models.base import base_of
from mmpeft.models.groups import Group, Rows, entering, form_group, group_of, leaving

_COLUMNS, _ROWS = "colwise", "rowwise"

_HARMLESS = "replicated_with_grad_allreduce"
"""Norms of a head, which are whole everywhere; their gradient is of no account where they are frozen."""

_STANDARD = {
    **{f"layers.*.self_attn.{name}_proj": _COLUMNS for name in "qkv"},
    "layers.*.self_attn.o_proj": _ROWS,
    "layers.*.mlp.gate_proj": _COLUMNS,
    "layers.*.mlp.up_proj": _COLUMNS,
    "layers.*.mlp.down_proj": _ROWS,
}

_LEFT_OUT = ("qwen3_vl_text",)
"""Language models of the standard kind whose layers transformers 5.24 has no plan for."""


@dataclass(frozen=True)
class TensorParallel(Group):
    """A group of processes that have a share of each matrix, and this one's place in it.

    Attributes:
        tokens: whether each has a part of the tokens between blocks.
    """

    tokens: bool = False


@dataclass(frozen=True)
class _Block:
    """An attention or a feed-forward part: its matrices by name in it."""

    module: nn.Module
    layer: int
    columns: tuple[str, ...]
    rows: tuple[str, ...]

    def matrices(self) -> Iterator[tuple[str, int, Any]]:
        """The name of each, the dimension of its weight that is cut, and its layer, plain or with a LoRA."""
        for dimension, names in enumerate((self.columns, self.rows)):
            for name in names:
                yield name, dimension, getattr(self.module, name)


def mark_shares(model: Any, mesh: Any) -> None:
    """Let transformers read no more than this process's share of each matrix; the model is on the meta device.

    Raises:
        ModelError: its layers cannot be shared out so.
    """
    for linear, dimension in _matrices(model, mesh.size()):
        placed = distribute_tensor(linear.weight.data, mesh, [Shard(dimension)], src_data_rank=None)
        linear.weight = nn.Parameter(placed, requires_grad=linear.weight.requires_grad)
        if linear.bias is not None and dimension == 0:
            placed = distribute_tensor(linear.bias.data, mesh, [Shard(0)], src_data_rank=None)
            linear.bias = nn.Parameter(placed, requires_grad=linear.bias.requires_grad)


def share_layers(model: Any, parallel: TensorParallel) -> None:
    """Keep this process's share of each matrix, and let the group add up what its shares make.

    Args:
        model: a transformers model, whole or read with `mark_shares`, without an adapter or with one; changed in place.

    Raises:
        ModelError: its layers cannot be shared out so.
    """
    for linear, dimension in list(_matrices(model, parallel.degree)):
        _cut(linear, "weight", dimension, parallel)
        if linear.bias is not None and dimension == 0:
            _cut(linear, "bias", 0, parallel)
        elif linear.bias is not None and parallel.rank:
            # Added once, not by each process.
            nn.init.zeros_(linear.bias)
    form_group(model, parallel)
    rows = Rows(parallel)
    decoder = trained_model(model).get_decoder()
    # Features of pictures that are added between layers are those of whole rows.
    tokens = parallel.tokens and not hasattr(decoder, "_deepstack_process")
    last = len(decoder.layers) - 1
    for block in _blocks(model):
        parts = tokens and block.layer < last
        enter, leave = (rows.gather_sum, rows.scatter_sum) if parts else (rows.same_sum, rows.sum_same)
        block.module.register_forward_pre_hook(functools.partial(entering, enter), with_kwargs=True)
        block.module.register_forward_hook(functools.partial(leaving, leave))
    if tokens and last:
        decoder.layers[0].register_forward_pre_hook(functools.partial(entering, rows.part), with_kwargs=True)
        decoder.layers[last].register_forward_pre_hook(functools.partial(entering, rows.whole), with_kwargs=True)


def share_adapters(model: Any) -> None:
    """Let the LoRA of a matrix that is shared out use those of its rows or columns that go with the share."""
    parallel = group_of(model)
    if not isinstance(parallel, TensorParallel):
        return
    for block in _blocks(base_of(model)):
        for _, dimension, layer in block.matrices():
            if not isinstance(layer, LoraLayer):
                continue
            products: Any = (layer.lora_B, layer.lora_A)[dimension].values()
            for linear in products:
                share = parallel.share(linear.weight.shape[dimension])
                # On the instance, as accelerate's hooks do.
                linear.forward = functools.partial((_rows_of, _columns_of)[dimension], linear, share)


def partial_parameters(model: Any) -> list[nn.Parameter]:
    """What trains inside blocks: its gradient is the sum of those that the processes of a group have."""
    if not isinstance(group_of(model), TensorParallel):
        return []
    blocks = [block.module for block in _blocks(base_of(model))]
    return [weight for block in blocks for weight in block.parameters() if weight.requires_grad]


def _matrices(model: Any, degree: int) -> Iterator[tuple[nn.Linear, int]]:
    """Each matrix that is shared out, and the dimension of its weight that is cut."""
    config = model.config.get_text_config()
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if (found := getattr(config, heads, None) or degree) % degree:
            raise ModelError(
                f"distributed.tensor_parallel: {found} {heads.removeprefix('num_').replace('_', ' ')} of "
                f"{type(model).__name__}'s language model cannot be shared by {degree} processes; use a divisor of "
                f"{found}"
            )
    for block in _blocks(model):
        for name, dimension, layer in block.matrices():
            linear: Any = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
            if (width := (linear.out_features, linear.in_features)[dimension]) % degree:
                raise ModelError(
                    f"distributed.tensor_parallel: {width} channels of {name} cannot be shared by {degree} processes"
                )
            yield linear, dimension


def _blocks(model: Any) -> list[_Block]:
    """The parts of each layer, by transformers' plan of the language model.

    Raises:
        ModelError: there is no plan, or one of another kind.
    """
    decoder = trained_model(model).get_decoder()
    config = decoder.config
    plan = _STANDARD if config.model_type in _LEFT_OUT else getattr(config, "base_model_tp_plan", None) or {}
    rules = {name: rule for name, rule in plan.items() if name.startswith("layers.")}
    found: dict[str, dict[str, list[str]]] = {}
    for name, module in decoder.named_modules():
        if not name.startswith("layers.") or not isinstance(module, nn.Linear | LoraLayer):
            continue
        if ".base_layer" in name or ".lora_" in name:
            continue
        parent, _, own = name.rpartition(".")
        rule = rules.get(re.sub(r"\.\d+\.", ".*.", name), "none")
        found.setdefault(parent, {}).setdefault(rule, []).append(own)
    kinds = {rule for by_rule in found.values() for rule in by_rule} | set(rules.values())
    bare = [name for name in found if any(True for _ in decoder.get_submodule(name).parameters(recurse=False))]
    if not found or kinds - {_COLUMNS, _ROWS, _HARMLESS} or bare:
        raise ModelError(
            f"distributed.tensor_parallel: layers of {config.model_type!r} cannot be shared out by columns and rows; "
            "use fsdp2 or zero3"
        )
    return [
        _Block(
            decoder.get_submodule(name),
            int(name.split(".")[1]),
            tuple(rule.get(_COLUMNS, ())),
            tuple(rule.get(_ROWS, ())),
        )
        for name, rule in found.items()
    ]


def _cut(linear: nn.Linear, name: str, dimension: int, parallel: TensorParallel) -> None:
    whole = getattr(linear, name)
    if isinstance(whole, DTensor):
        own = whole.to_local()
    else:
        own = whole.data.chunk(parallel.degree, dim=dimension)[parallel.rank].clone()
    kept = nn.Parameter(own.detach(), requires_grad=whole.requires_grad)
    kept.whole_numel = whole.numel()  # type: ignore[attr-defined]
    setattr(linear, name, kept)


def _rows_of(linear: nn.Linear, share: slice, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, linear.weight[share])


def _columns_of(linear: nn.Linear, share: slice, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, linear.weight[:, share])
