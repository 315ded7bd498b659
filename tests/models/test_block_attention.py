"""Attention in large matrix products: the numbers of PyTorch's kernel, in whatever blocks."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mmpeft.core.tree import Segment, Tree
from mmpeft.models.block_attention import BLOCK, KEPT, block_attention, blocks_pay
from mmpeft.models.tree_attention import tree_attention

SHAPES = {
    "short": (3, 4, 2, 40, 40),
    "one head a group": (1, 4, 4, 40, 40),
    "several blocks, weights kept": (1, 2, 1, KEPT, KEPT),
    "several blocks, weights made again": (1, 2, 2, 2 * BLOCK + 91, 2 * BLOCK + 91),
    "behind a prefix": (2, 4, 2, 30, 75),
    "behind a long prefix": (1, 2, 1, BLOCK + 200, KEPT + 300),
}


def inputs(shape, dtype):
    rows, heads, groups, queries, keys = shape
    torch.manual_seed(0)
    made = [
        torch.randn(rows, count, length, 16) for count, length in ((heads, queries), (groups, keys), (groups, keys))
    ]
    query, key, value = (each.to(torch.bfloat16).to(dtype).requires_grad_() for each in made)
    mask = None
    if queries != keys:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        mask = torch.zeros(queries, keys).masked_fill_(~seen, -torch.inf).to(dtype)
    return query, key, value, mask


def results(attend, query, key, value):
    out = attend(query, key, value)
    (out.double() * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
    return [out.detach(), query.grad, key.grad, value.grad]


def by_torch(mask):
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, scale=0.3, enable_gqa=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_numbers_are_those_of_torch(shape):
    *qkv, mask = inputs(shape, torch.float32)
    expected = results(by_torch(mask), *qkv)
    *qkv, mask = inputs(shape, torch.float32)
    found = results(lambda q, k, v: block_attention(q, k, v, mask, 0.3), *qkv)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_half_precision_is_as_near_to_the_exact_numbers_as_torch(shape):
    *qkv, mask = inputs(shape, torch.float64)
    exact = results(by_torch(mask), *qkv)
    *qkv, mask = inputs(shape, torch.bfloat16)
    torchs = results(by_torch(mask), *qkv)
    *qkv, mask = inputs(shape, torch.bfloat16)
    ours = results(lambda q, k, v: block_attention(q, k, v, mask, 0.3), *qkv)
    for right, theirs, own in zip(exact, torchs, ours, strict=True):
        assert own.dtype == torch.bfloat16
        off, torch_off = ((each.double() - right).norm() / right.norm() for each in (own, theirs))
        assert off < 1.5 * torch_off + 1e-3


def test_it_is_for_half_precision_alone():
    assert not blocks_pay(torch.zeros(1))
    assert not blocks_pay(torch.zeros(1, dtype=torch.float16))
    assert not blocks_pay(torch.zeros(1, dtype=torch.bfloat16, device="meta"))


def test_autocast_does_not_round_its_scores():
    *qkv, mask = inputs(SHAPES["short"], torch.bfloat16)
    expected = block_attention(*qkv, mask, 0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = block_attention(*qkv, mask, 0.3)
    assert torch.equal(found, expected)


@pytest.mark.skipif(
    not blocks_pay(torch.zeros(1, dtype=torch.bfloat16)), reason="the processor has no bfloat16 instructions"
)
def test_rows_of_a_tree_run_so_and_can_be_told_not_to():
    bounds = ((0, 20, None), (20, 27, (0, 20)), (27, 34, (0, 20)), (34, 50, None))
    segments = tuple(Segment(start=start, end=end, parent=parent) for start, end, parent in bounds)
    tree = Tree(segments=segments, samples=3, tokens=70, padded=81)
    torch.manual_seed(0)
    query = torch.randn(1, 4, 50, 16, dtype=torch.bfloat16)
    key, value = (torch.randn(1, 2, 50, 16, dtype=torch.bfloat16) for _ in range(2))
    module = torch.nn.Module()
    found, _ = tree_attention(module, query, key, value, None, tree=tree)
    plain, _ = tree_attention(module, query, key, value, None, tree=tree, blocks=False)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=3e-2, atol=3e-2)
