"""Ascend's fused operators that mmpeft or transformers use, by reference code on the CPU, forward and backward.

Signatures are those of op-plugin's op_plugin_functions.yaml. Each is one operator in the simulation's counts.
"""

import contextlib
import functools

import torch

from torch_npu.extension import device

LIMITLESS = 2147483647


@contextlib.contextmanager
def _one_operator(name):
    device.enter(f"npu::{name}")
    try:
        yield
    finally:
        device.leave()


class _Computed(torch.autograd.Function):
    """`function` of tensors on the device, computed by the CPU; what a backward needs stays on the device.

    Tensors of another class have a shape and nothing behind it, and so have outputs then, by `shapes`: their sizes and
    whether they are float32. The real operators have kernels for the meta device.
    """

    @staticmethod
    def forward(ctx, name, function, shapes, *tensors):
        ctx.name, ctx.function, ctx.where = name, function, tensors[0].device
        ctx.empty = type(tensors[0]) not in (torch.Tensor, torch.nn.Parameter)
        if ctx.empty:
            single = {True: torch.float32, False: tensors[0].dtype}
            found = tuple(tensors[0].new_empty(shape, dtype=single[wide]) for shape, wide in shapes)
            trains = [not wide for _, wide in shapes]
        else:
            with _one_operator(name):
                outputs = ctx.function(*_on_host(tensors))
                found = tuple(each.detach().to(ctx.where) for each in outputs)
            trains = [each.requires_grad for each in outputs]
        ctx.save_for_backward(*tensors, *[each for each, trained in zip(found, trains, strict=True) if not trained])
        ctx.count = len(tensors)
        ctx.mark_non_differentiable(*[each for each, trained in zip(found, trains, strict=True) if not trained])
        return found

    @staticmethod
    def backward(ctx, *gradients):
        tensors = ctx.saved_tensors[: ctx.count]
        if ctx.empty:
            return None, None, None, *[torch.empty_like(each) for each in tensors]
        with _one_operator(f"{ctx.name}_backward"):
            inputs = _on_host(tensors)
            pairs = [
                (output, gradient.cpu())
                for output, gradient in zip(ctx.function(*inputs), gradients, strict=True)
                if output.requires_grad and gradient is not None
            ]
            outputs, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
            found = [None if each is None else each.to(ctx.where) for each in found]
        return None, None, None, *found


def _on_host(tensors):
    return [each.detach().cpu().requires_grad_(each.is_floating_point()) for each in tensors]


def _without_autocast(function):
    @functools.wraps(function)
    def computed(*tensors):
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            return function(*tensors)

    return computed


def _sees(queries, keys, mode, mask, before, after):
    """[queries, keys], True where a query sees a key."""
    row, column = torch.arange(queries)[:, None], torch.arange(keys)[None]
    shift = keys - queries
    if mode in (0, 1):
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if mode == 0:
            seen &= (column >= row - before) & (column <= row + after)
        return seen if mask is None else seen & ~mask
    assert mask is not None, "these modes take the triangular mask"
    assert tuple(mask.shape[-2:]) == (2048, 2048), "these modes take a mask of 2048 x 2048"
    assert torch.equal(mask.reshape(2048, 2048), torch.ones(2048, 2048).triu(1).bool()), "True is not seen"
    if mode == 2:
        return column <= row
    if mode == 3:
        return column <= row + shift
    assert mode == 4, f"sparse_mode {mode} is not simulated"
    return (column >= row + shift - before) & (column <= row + shift + after)


def _attend(query, key, value, scale, seen):
    """[heads, queries, channels], fewer heads of keys; in float32."""
    groups = query.shape[-3] // key.shape[-3]
    key, value = (each.float().repeat_interleave(groups, dim=-3) for each in (key, value))
    scores = (query.float() @ key.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    # A query that sees nothing gets zeros.
    weights = scores.softmax(-1).nan_to_num(0.0)
    return (weights @ value).to(query.dtype)


def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=LIMITLESS,
    next_tockens=LIMITLESS,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
):
    """Attention in the layouts BNSD, BSND, BSH, SBH and TND; no dropout, no pse."""
    assert (pse, padding_mask, prefix, keep_prob) == (None, None, None, 1.0), "not simulated"
    assert query.dtype == key.dtype == value.dtype, "query, key and value have one dtype"
    assert all(each.is_npu for each in (query, key, value)), "query, key and value are on the device"

    @_without_autocast
    def computed(query, key, value):
        mask = None
        if atten_mask is not None:
            with _one_operator("mask"):
                mask = atten_mask.cpu()
        sees = lambda queries, keys: _sees(queries, keys, sparse_mode, mask, pre_tockens, next_tockens)  # noqa: E731
        if input_layout == "TND":
            assert head_num == query.shape[1]
            assert head_num % key.shape[1] == 0
            assert all(type(end) is int for end in (*actual_seq_qlen, *actual_seq_kvlen)), "lengths are of the host"
            assert (actual_seq_qlen[-1], actual_seq_kvlen[-1]) == (len(query), len(key))
            parts = []
            starts = zip((0, *actual_seq_qlen), (0, *actual_seq_kvlen), actual_seq_qlen, actual_seq_kvlen, strict=False)
            for q, k, to_q, to_k in starts:
                one = (each.transpose(0, 1) for each in (query[q:to_q], key[k:to_k], value[k:to_k]))
                parts.append(_attend(*one, scale, sees(to_q - q, to_k - k)).transpose(0, 1))
            return (torch.cat(parts),)
        to_heads, back = _LAYOUTS[input_layout]
        heads = [to_heads(each, head_num, query) for each in (query, key, value)]
        return (back(_attend(*heads, scale, sees(heads[0].shape[-2], heads[1].shape[-2]))),)

    # Its statistics take eight numbers for each head and query, twice.
    channels = query.shape[-1] if input_layout in ("BNSD", "BSND", "TND") else query.shape[-1] // head_num
    kept = (*query.shape[:-1], 8) if channels == query.shape[-1] else (*query.shape[:-1], head_num, 8)
    out, most, total = _Computed.apply(
        "npu_fusion_attention",
        lambda *tensors: (*computed(*tensors), torch.zeros(kept), torch.zeros(kept)),
        ((query.shape, False), (kept, True), (kept, True)),
        query,
        key,
        value,
    )
    return out, most, total, None, 0, 0, 0


def _split(tensor, heads, query):
    channels = query.shape[-1] // heads
    return tensor.unflatten(-1, (-1, channels))


_LAYOUTS = {
    "BNSD": (lambda each, heads, query: each, lambda out: out),
    "BSND": (lambda each, heads, query: each.transpose(1, 2), lambda out: out.transpose(1, 2)),
    "BSH": (lambda *each: _split(*each).transpose(1, 2), lambda out: out.transpose(1, 2).flatten(2)),
    "SBH": (lambda *each: _split(*each).permute(1, 2, 0, 3), lambda out: out.permute(2, 0, 1, 3).flatten(2)),
}


PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)


def npu_rms_norm(self, gamma, epsilon=1e-6):
    """`self` by the root of its mean square, times gamma; and the inverse root."""
    assert self.is_npu and gamma.is_npu, "both are on the device"  # noqa: PT018
    assert self.dtype == gamma.dtype, "gamma has the dtype of self"
    assert self.dtype in PRECISIONS
    assert 2 <= self.dim() <= 8
    assert self.shape[self.dim() - gamma.dim() :] == gamma.shape, "gamma has the last dimensions of self"

    @_without_autocast
    def computed(self, gamma):
        inverse = torch.rsqrt(self.float().pow(2).mean(-1, keepdim=True) + epsilon)
        return (self.float() * inverse * gamma.float()).to(self.dtype), inverse.detach()

    shapes = (self.shape, False), ((*self.shape[:-1], 1), True)
    return _Computed.apply("npu_rms_norm", computed, shapes, self, gamma)


def npu_swiglu(self, dim=-1):
    """SiLU of the first half times the second."""
    assert self.is_npu
    assert self.dtype in PRECISIONS
    assert 1 <= self.dim() <= 8
    assert self.numel() > 0, "it takes no empty tensor"
    assert self.is_contiguous(), "it takes no tensor that is not contiguous"
    assert self.shape[dim] % 2 == 0

    @_without_autocast
    def computed(self):
        gate, up = self.float().chunk(2, dim)
        return ((torch.nn.functional.silu(gate) * up).to(self.dtype),)

    half = list(self.shape)
    half[dim] //= 2
    return _Computed.apply("npu_swiglu", computed, ((half, False),), self)[0]


def npu_rotary_mul(self, r1, r2, rotary_mode="half", rotate=None):
    """Rotated by cosines r1 and sines r2 of [-1, 1]: by halves, or by neighbours ("interleave")."""
    assert rotate is None, "not simulated"
    assert self.is_npu and r1.is_npu and r2.is_npu, "all are on the device"  # noqa: PT018
    # The operator casts cosines and sines to the dtype of self; it is not simulated.
    assert self.dtype == r1.dtype == r2.dtype
    assert self.dtype in PRECISIONS
    assert self.dim() == r1.dim() == r2.dim()
    assert self.dim() in (3, 4)
    assert self.shape[-1] == r1.shape[-1] == r2.shape[-1]
    assert self.shape[-1] % 2 == 0
    assert self.shape[-1] < 896
    assert max(self.shape[:-2]) < 1000, "rows and heads, in the layouts that begin with them"

    @_without_autocast
    def computed(self, r1, r2):
        assert max(r1.abs().max(), r2.abs().max()) <= 1, "cosines and sines are of [-1, 1]"
        if rotary_mode == "half":
            first, second = self.chunk(2, -1)
            turned = torch.cat((-second, first), -1)
        else:
            assert rotary_mode == "interleave", rotary_mode
            turned = torch.stack((-self[..., 1::2], self[..., ::2]), -1).flatten(-2)
        return (self * r1 + turned * r2,)

    return _Computed.apply("npu_rotary_mul", computed, ((self.shape, False),), self, r1, r2)[0]
