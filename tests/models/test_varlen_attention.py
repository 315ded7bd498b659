"""A row in one call gives what it gives segment by segment, and kernels get arguments as they are documented.

The kernels themselves run on CUDA and on NPUs alone. What stands in for them computes from the very arguments that they
are called with, by their documentation.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.core.tree import Segment, Tree
from mmpeft.models import varlen_attention as varlen
from mmpeft.models.tree_attention import tree_attention
from mmpeft.models.varlen_attention import cuda_kernel, kernel_for, layout_of, npu_kernel, varlen_attention

CPU = torch.device("cpu")
LIMITLESS = 2147483647


def tree_of(*groups):
    """Of each group (tokens of the segment that others continue, theirs): (4, 3, 2) is a 4, a 3 and a 2 on it."""
    segments, at = [], 0
    for shared, *own in groups:
        parent = (at, at + shared)
        segments.append(Segment(start=at, end=at + shared))
        at += shared
        for length in own:
            segments.append(Segment(start=at, end=at + length, parent=parent))
            at += length
    return Tree(segments=tuple(segments), samples=len(segments), tokens=at, padded=at)


DRAWN = tree_of((4, 3, 2), (4,), (9, 1, 1, 6), (1,))
ALONE = tree_of((5,), (3,))


def row(tree, heads=4, fewer=2, channels=8, dtype=torch.float32, device="cpu"):
    tokens = tree.segments[-1].end
    made = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, count, tokens, channels, generator=made).to(device, dtype).requires_grad_()
        for count in (heads, fewer, fewer)
    ]


def attended(query, key, value, ends_q, ends_k, scale, before, after):
    """Each sequence by itself: a query sees `before` keys before its own and `after` after it, the last at the last."""
    out, start_q, start_k = [], 0, 0
    for end_q, end_k in zip(ends_q, ends_k, strict=True):
        q, k, v = query[start_q:end_q].float(), key[start_k:end_k].float(), value[start_k:end_k].float()
        k, v = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (k, v))
        own = torch.arange(end_q - start_q)[:, None] + (end_k - start_k) - (end_q - start_q)
        other = torch.arange(end_k - start_k)
        seen = (other >= own - before) & (other <= own + after)
        scores = torch.einsum("qhc,khc->hqk", q, k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khc->qhc", weights, v))
        start_q, start_k = end_q, end_k
    return torch.cat(out).to(query.dtype)


def by_documentation(query, key, value, layout, scale, window):
    before = LIMITLESS if window is None else window - 1
    return attended(query, key, value, layout.ends_q, layout.ends_k, scale, before, 0)


def same(found, expected, inputs):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    ours = torch.autograd.grad((found * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


GROUPS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, window=st.sampled_from([None, 1, 2, 5, 40]), fewer=st.sampled_from([1, 2, 4]))
def test_a_row_in_one_call_is_the_row_segment_by_segment(groups, window, fewer):
    tree = tree_of(*groups)
    inputs = row(tree, fewer=fewer)
    found = varlen_attention(by_documentation, *inputs, tree, scale=0.3, window=window)
    expected, _ = tree_attention(None, *inputs, None, scaling=0.3, sliding_window=window, tree=tree)
    same(found, expected, inputs)


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS)
def test_the_layout_puts_shared_tokens_before_each_ones_own(groups):
    tree = tree_of(*groups)
    layout = layout_of(tree, CPU)
    count = len(tree.segments)
    assert layout.ends_q == tuple(segment.end for segment in tree.segments)
    assert layout.cumulative_q.tolist() == [0, *layout.ends_q]
    assert layout.cumulative_k.tolist() == [0, *layout.ends_k]
    assert {layout.cumulative_q.dtype, layout.cumulative_k.dtype} == {torch.int32}
    places = list(range(layout.ends_q[-1])) if layout.keys is None else layout.keys.tolist()
    assert len(places) == layout.ends_k[-1]
    assert (layout.keys is None) == all(segment.parent is None for segment in tree.segments)
    lengths = []
    for at, segment in enumerate(tree.segments):
        keys = places[(0, *layout.ends_k)[at] : layout.ends_k[at]]
        assert keys == [*range(*(segment.parent or (0, 0))), *range(segment.start, segment.end)]
        lengths.append(len(keys))
    assert (layout.max_q, layout.max_k) == (max(s.end - s.start for s in tree.segments), max(lengths))
    assert len(lengths) == count


def test_layers_share_a_layout_that_goes_with_its_row():
    tree = tree_of((4, 3), (2,))
    with torch.inference_mode():
        made = layout_of(tree, CPU)
    assert layout_of(tree, CPU) is made
    assert not made.keys.is_inference(), "what evaluation made would not serve training"
    count = len(varlen._LAYOUTS)
    del tree
    assert len(varlen._LAYOUTS) == count - 1


def test_gradients_of_what_many_segments_see_are_summed_in_float32():
    # 300 ones: bfloat16 has no 257, and would stay at 256.
    tree = tree_of((1, *[1] * 300))
    query, key, value = row(tree, heads=1, fewer=1, dtype=torch.bfloat16)

    def last_values(query, key, value, layout, scale, window):
        first = layout.cumulative_k[1:-1]
        return torch.cat((value[:1] * 0, value.index_select(0, first)))

    varlen_attention(last_values, query, key, value, tree).sum().backward()
    assert value.grad[0, 0, 0].tolist() == [300.0] * 8


class Described(SimpleNamespace):
    """As much of a tensor on a device that is not here as the choice of a kernel looks at."""


def query_on(kind, dtype=torch.bfloat16, channels=64):
    return Described(
        device=torch.device(kind) if kind != "npu" else Described(type="npu"), dtype=dtype, shape=(1, 4, 9, channels)
    )


@pytest.fixture
def flash_built(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


@pytest.fixture
def hopper(flash_built, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.fixture
def npu(monkeypatch):
    """A torch_npu that computes by its documentation what the arguments of npu_fusion_attention ask for."""
    module = ModuleType("torch_npu")
    module.calls = []

    def npu_fusion_attention(
        query,
        key,
        value,
        head_num,
        input_layout,
        *,
        pse=None,
        padding_mask=None,
        atten_mask=None,
        scale=1.0,
        keep_prob=1.0,
        pre_tockens=LIMITLESS,
        next_tockens=LIMITLESS,
        actual_seq_qlen=None,
        actual_seq_kvlen=None,
        sparse_mode=0,
    ):
        module.calls.append(sparse_mode)
        assert input_layout == "TND"
        assert query.is_contiguous()
        assert key.is_contiguous()
        assert value.is_contiguous()
        assert head_num == query.shape[1]
        assert head_num % key.shape[1] == 0
        assert (actual_seq_qlen[-1], actual_seq_kvlen[-1]) == (len(query), len(key))
        assert all(type(end) is int for end in (*actual_seq_qlen, *actual_seq_kvlen))
        assert pse is None
        assert padding_mask is None
        assert keep_prob == 1.0
        assert sparse_mode in (3, 4), "aligned at the lower right"
        assert atten_mask.dtype == torch.bool
        assert torch.equal(atten_mask, torch.ones(2048, 2048).triu(1).bool()), "True is not seen"
        before, after = (LIMITLESS, 0) if sparse_mode == 3 else (pre_tockens, next_tockens)
        out = attended(query, key, value, actual_seq_qlen, actual_seq_kvlen, scale, before, after)
        return out, None, None, None, 0, 0, 0

    module.npu_fusion_attention = npu_fusion_attention
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    # Which also teaches torch the name of its device; without, torch fails on it.
    known = torch.amp.is_autocast_available
    monkeypatch.setattr(torch.amp, "is_autocast_available", lambda kind: kind != "npu" and known(kind))
    return module


def test_a_kernel_is_chosen_for_half_precision_on_its_device(hopper, npu):
    for dtype in (torch.bfloat16, torch.float16):
        assert kernel_for(query_on("cuda", dtype), DRAWN, 0.0) is cuda_kernel
        assert kernel_for(query_on("npu", dtype), DRAWN, 0.0) is npu_kernel
    with torch.autocast("cpu", torch.bfloat16):
        assert kernel_for(query_on("cpu"), DRAWN, 0.0) is None


@pytest.mark.parametrize("kind", ["cpu", "cuda", "npu", "meta"])
def test_no_kernel_takes_what_none_can(kind, hopper, npu):
    both_ways = Tree(segments=(Segment(start=0, end=9, blocks=((2, 5),)),), samples=1, tokens=9, padded=9)
    assert kernel_for(query_on(kind), both_ways, 0.0) is None
    assert kernel_for(query_on(kind), DRAWN, 0.1) is None
    assert kernel_for(query_on(kind, torch.float32), DRAWN, 0.0) is None
    assert kernel_for(query_on(kind, channels=20), DRAWN, 0.0) is None
    assert kernel_for(query_on(kind, channels=512), DRAWN, 0.0) is None


@pytest.mark.parametrize(
    ("chip", "channels", "taken"),
    [((7, 5), 64, False), ((8, 0), 256, True), ((8, 6), 192, True), ((8, 6), 256, False), ((12, 0), 256, False)],
)
def test_chips_that_flash_attention_does_not_run_on_are_left_out(flash_built, monkeypatch, chip, channels, taken):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip)
    assert kernel_for(query_on("cuda", channels=channels), DRAWN, 0.0) is (cuda_kernel if taken else None)


def test_a_torch_built_without_flash_attention_goes_on_segment_by_segment(hopper, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert kernel_for(query_on("cuda"), DRAWN, 0.0) is None


def before_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=()):
    """As torch 2.11 has it: the same heads of keys as of queries."""


@pytest.mark.parametrize("older", [None, SimpleNamespace(varlen_attn=before_2_12)])
def test_an_older_torch_goes_on_segment_by_segment(monkeypatch, hopper, older):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", older)
    varlen._varlen_attn.cache_clear()
    try:
        assert kernel_for(query_on("cuda"), DRAWN, 0.0) is None
    finally:
        varlen._varlen_attn.cache_clear()


def test_an_npu_without_its_kernel_or_with_too_many_segments_goes_on_segment_by_segment(npu, monkeypatch):
    assert kernel_for(query_on("npu"), tree_of(*[(1,)] * 2048), 0.0) is npu_kernel
    assert kernel_for(query_on("npu"), tree_of(*[(1,)] * 2049), 0.0) is None
    monkeypatch.delitem(sys.modules, "torch_npu")
    assert kernel_for(query_on("npu"), DRAWN, 0.0) is None


@pytest.mark.parametrize("tree", [DRAWN, ALONE])
@pytest.mark.parametrize(("window", "mode"), [(None, 3), (4, 4), (1, 4), (40, 3)])
@pytest.mark.parametrize("fewer", [1, 4])
def test_the_npu_is_told_what_each_segment_sees(npu, tree, window, mode, fewer):
    inputs = row(tree, fewer=fewer)
    found = varlen_attention(npu_kernel, *inputs, tree, window=window)
    assert npu.calls == [mode]
    expected, _ = tree_attention(None, *inputs, None, sliding_window=window, tree=tree)
    same(found, expected, inputs)


class Flash(TorchDispatchMode):
    """Computes from the arguments of torch's own operator; flash attention's own windows, -1 for no end."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.torch_attn._varlen_attn.default:
            return function(*args, **(kwargs or {}))
        self.calls += 1
        query, key, value, begins_q, begins_k, max_q, max_k, causal, scale, (left, right), *_ = args
        assert begins_q.dtype == begins_k.dtype == torch.int32
        assert begins_q[0] == begins_k[0] == 0
        assert max_q == begins_q.diff().max()
        assert max_k == begins_k.diff().max()
        after = 0 if causal else LIMITLESS if right < 0 else right
        before = LIMITLESS if left < 0 else left
        out = attended(query, key, value, begins_q[1:].tolist(), begins_k[1:].tolist(), scale, before, after)
        return out, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)


@pytest.mark.parametrize("tree", [DRAWN, ALONE])
@pytest.mark.parametrize("window", [None, 4, 1, 40])
@pytest.mark.parametrize("fewer", [1, 4])
def test_cuda_is_told_what_each_segment_sees(tree, window, fewer):
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    with torch.no_grad():
        inputs = row(tree, fewer=fewer)
        with Flash() as flash:
            found = varlen_attention(cuda_kernel, *inputs, tree, window=window)
        expected, _ = tree_attention(None, *inputs, None, sliding_window=window, tree=tree)
    assert flash.calls == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def count(self, word):
        return sum(word in name for name in self.names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the last test runs the kernel itself")
def test_a_row_on_cuda_is_one_call(hopper):
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    tree = tree_of((7, 3, 2), (5,))
    with FakeTensorMode(), torch.no_grad(), Called() as called:
        inputs = [torch.empty(1, heads, 17, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2)]
        for _ in range(3):
            found, _ = tree_attention(None, *inputs, None, tree=tree)
        assert (found.shape, found.dtype, found.device.type) == ((1, 17, 4, 64), torch.bfloat16, "cuda")
    assert called.count("torch_attn::_varlen_attn") == 3
    assert called.count("aten::index_select") == 2 * 3
    assert called.count("scaled_dot_product") == 0
    assert not called.count("_local_scalar_dense"), "a number was read from the device"


@pytest.mark.parametrize("blocks", [True, False])
def test_the_kernel_can_be_switched_off(monkeypatch, blocks):
    calls = []

    def counted(*args):
        calls.append(args)
        return by_documentation(*args)

    monkeypatch.setattr("mmpeft.models.tree_attention.kernel_for", lambda query, tree, dropout: counted)
    inputs = row(DRAWN)
    found, _ = tree_attention(None, *inputs, None, scaling=0.3, sliding_window=4, tree=DRAWN, blocks=blocks)
    assert len(calls) == blocks
    expected, _ = tree_attention(None, *inputs, None, scaling=0.3, sliding_window=4, tree=DRAWN, blocks=False)
    same(found, expected, inputs)


def test_gradients_pass_through_torchs_operator():
    pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn")
    inputs = [
        torch.empty(1, heads, 26, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    ]
    with Called() as called:
        found = varlen_attention(cuda_kernel, *inputs, DRAWN, window=4)
        found.sum().backward()
    assert [each.grad.shape for each in inputs] == [each.shape for each in inputs]
    assert called.count("torch_attn::_varlen_attn") == 2


def test_autocast_computes_in_half_precision(npu):
    inputs = row(DRAWN, channels=16)
    query, key, value = inputs
    with torch.autocast("cpu", torch.bfloat16):
        found = varlen_attention(npu_kernel, query, key, value.bfloat16(), DRAWN)
        expected, _ = tree_attention(None, query, key, value.bfloat16(), None, tree=DRAWN, blocks=False)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
def test_on_cuda_the_kernel_agrees_with_attention_segment_by_segment(window):
    tree = tree_of((200, 30, 70, 70), (129,), (64, 1), (300,))
    inputs = row(tree, heads=8, fewer=2, channels=64, dtype=torch.bfloat16, device="cuda")
    inputs = [each.detach().requires_grad_() for each in inputs]
    assert kernel_for(inputs[0], tree, 0.0) is cuda_kernel
    exact = [each.detach().float().requires_grad_() for each in inputs]
    found, _ = tree_attention(None, *inputs, None, sliding_window=window, tree=tree)
    expected, _ = tree_attention(None, *exact, None, sliding_window=window, tree=tree)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    expected.square().sum().backward()
    for one, other in zip(inputs, exact, strict=True):
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(one.grad.float(), other.grad, rtol=5e-2, atol=2e-2 * scale)
