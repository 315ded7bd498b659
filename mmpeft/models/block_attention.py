"""Attention in half precision on a CPU, as large matrix products over blocks of queries.

PyTorch's own kernel for CPUs computes a tile at a time and is as slow in bfloat16 as in float32; the matrix products of
a processor with bfloat16 instructions are several times faster. Scores and their softmax stay in float32, as there.

    block of queries      scores = q k'  (float32)       p = softmax  (-> bfloat16)       p v
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

BLOCK = 256
"""Queries of a block, about: few enough that causal attention skips most of what it does not see."""

KEPT = 512
"""Keys, up to which weights are kept for the backward; of longer samples they are computed again."""


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Like `scaled_dot_product_attention` with `enable_gqa`, causal where no mask is given.

    Args:
        query: [rows, heads, queries, channels], in half precision.
        key: [rows, heads or a divisor of it, keys, channels]; value: the same.
        mask: [queries, keys], added to the scores; None: causal, with as many keys as queries.

    Returns:
        [rows, heads, queries, channels]
    """
    out: torch.Tensor = _Blocks.apply(query, key, value, mask, scale)
    return out


def blocks_pay(query: torch.Tensor) -> bool:
    """Whether these queries are computed faster so than by PyTorch's own kernel."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        rows, heads, queries, channels = query.shape
        # In the order in which the next layer reads it, so that no copy follows.
        out = query.new_empty(rows, queries, heads, channels).transpose(1, 2)
        kept = key.shape[2] <= KEPT
        weights = []
        with torch.autocast("cpu", enabled=False):
            keys, values = key.flatten(0, 1), value.flatten(0, 1)
            for start, end, seen in _blocks(queries, key.shape[2], mask):
                part = query[:, :, start:end]
                own_mask = _own_mask(mask, start, end, seen, query.device)
                weight = _weights(_folded(part, key.shape[1]), keys[:, :seen], own_mask, scale)
                out[:, :, start:end] = torch.bmm(weight, values[:, :seen]).view(part.shape)
                if kept:
                    weights.append(weight)
        ctx.save_for_backward(query, key, value, mask, *weights)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask, *weights = ctx.saved_tensors
        queries, groups = query.shape[2], key.shape[1]
        of_query = torch.empty_like(query)
        blocks = list(_blocks(queries, key.shape[2], mask))
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        of_key = of_value = torch.empty(0)
        several = len(blocks) > 1
        if several:
            # Their sums are rounded once, at the end.
            of_key, of_value = (torch.zeros_like(each, dtype=torch.float32) for each in (keys, values))
        with torch.autocast("cpu", enabled=False):
            for number, (start, end, seen) in enumerate(blocks):
                part = query[:, :, start:end]
                folded = _folded(part, groups)
                weight = (
                    weights[number]
                    if weights
                    else _weights(folded, keys[:, :seen], _own_mask(mask, start, end, seen, query.device), ctx.scale)
                )
                out = _folded(gradient[:, :, start:end], groups)
                own_value = torch.bmm(weight.transpose(1, 2), out)
                of_weight = torch.bmm(out, values[:, :seen].transpose(1, 2))
                scores = torch._softmax_backward_data(of_weight, weight, -1, weight.dtype).mul_(ctx.scale)
                of_query[:, :, start:end] = torch.bmm(scores, keys[:, :seen]).view(part.shape)
                own_key = torch.bmm(scores.transpose(1, 2), folded)
                if several:
                    of_key[:, :seen] += own_key
                    of_value[:, :seen] += own_value
                else:
                    of_key, of_value = own_key, own_value
        of_key, of_value = (each.to(key.dtype).view(key.shape) for each in (of_key, of_value))
        return of_query, of_key, of_value, None, None


def _blocks(queries: int, keys: int, mask: torch.Tensor | None) -> Iterator[tuple[int, int, int]]:
    """Of each block the queries [start, end), and how many keys it sees of those from the first."""
    count = max(1, round(queries / BLOCK))
    size = -(-queries // count)
    for start in range(0, queries, size):
        end = min(start + size, queries)
        yield start, end, end if mask is None else keys


def _own_mask(mask: torch.Tensor | None, start: int, end: int, seen: int, device: torch.device) -> torch.Tensor:
    """[queries, seen keys] of a block."""
    if mask is not None:
        return mask[start:end]
    return torch.full((end - start, seen), -torch.inf, device=device).triu_(start + 1)


def _weights(folded: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """[rows x groups, heads of a group x queries, keys] in half precision."""
    batch, queries, _ = folded.shape
    scores = mask.new_empty(batch, queries // mask.shape[0], *mask.shape, dtype=torch.float32).copy_(mask).flatten(1, 2)
    scores.baddbmm_(folded.float(), keys.transpose(1, 2).float(), alpha=scale)
    return torch.softmax(scores, -1).to(folded.dtype)


def _folded(query: torch.Tensor, groups: int) -> torch.Tensor:
    """[rows, heads, queries, channels] as [rows x groups, heads of a group x queries, channels]."""
    rows, heads, queries, channels = query.shape
    return query.reshape(rows * groups, heads // groups * queries, channels)
