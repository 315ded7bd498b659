"""A packed row's attention in one call of a kernel for samples of unequal length, on CUDA and on Ascend NPUs.

Keys are laid out so that those of the segment that one continues stand before its own; each segment then is a sequence
whose queries are its last tokens, and causal attention aligned at the lower right is what it sees:

    row             p p p p a a a b b                  keys       p p p p | p p p p a a a | p p p p b b
    cumulative_q    0 4 7 9                            cumulative_k  0 4 11 17

Written from the documentation of both kernels and tested against it; neither has been run on CUDA or on Ascend hardware
yet. What they don't take (float32, dropout, tokens that see each other both ways) runs segment by segment.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from mmpeft.core.tree import Tree

HALVES = frozenset({torch.bfloat16, torch.float16})


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where the queries and keys of each segment of a row stand.

    Attributes:
        keys: int32 [keys in all], the token of the row that each key is; None where no segment continues another.
        cumulative_q, cumulative_k: int32 [segments + 1], where each segment's queries and keys begin, and the end.
        ends_q, ends_k: the same as numbers, without the 0 that they begin with.
        max_q, max_k: the most that a segment has.
    """

    keys: torch.Tensor | None
    cumulative_q: torch.Tensor
    cumulative_k: torch.Tensor
    ends_q: tuple[int, ...]
    ends_k: tuple[int, ...]
    max_q: int
    max_k: int


class Kernel(Protocol):
    """Attention of every segment's queries to the keys that end with its own, causal from the lower right."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layout: Layout,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [tokens, heads, channels].
            key: [keys in all, heads or a divisor of it, channels]; value: the same.
            layout: whose they are.
            scale: that scores are multiplied with.
            window: how many tokens each one sees, itself among them; None: all before it.

        Returns:
            [tokens, heads, channels]
        """


def layout_of(tree: Tree, device: torch.device) -> Layout:
    """The layout of a row, made once and moved once for all layers; it goes with the row.

    Without waiting for the device: everything is known on the host.
    """
    layouts = _LAYOUTS.setdefault(tree, {})
    if device not in layouts:
        layouts[device] = _layout(tree, device)
    return layouts[device]


_LAYOUTS: WeakKeyDictionary[Tree, dict[torch.device, Layout]] = WeakKeyDictionary()


def _layout(tree: Tree, device: torch.device) -> Layout:
    seen = [(segment.parent or (0, 0), (segment.start, segment.end)) for segment in tree.segments]
    queries = [end - start for _, (start, end) in seen]
    keys = [end - start + own for ((start, end), _), own in zip(seen, queries, strict=True)]
    ends_q, ends_k = tuple(accumulate(queries)), tuple(accumulate(keys))
    shared = ends_q != ends_k
    index = [token for pair in seen for bounds in pair for token in range(*bounds)] if shared else []
    # What evaluation makes under inference_mode could not be used in training.
    with torch.inference_mode(False):
        host = torch.tensor([*index, 0, *ends_q, 0, *ends_k], dtype=torch.int32)
        if torch.accelerator.is_available():
            # From pageable memory the copy would wait for all that the device still has to do.
            host = host.pin_memory()
        count = len(queries) + 1
        moved, cumulative_q, cumulative_k = host.to(device, non_blocking=True).split((len(index), count, count))
    return Layout(
        keys=moved if shared else None,
        cumulative_q=cumulative_q,
        cumulative_k=cumulative_k,
        ends_q=ends_q,
        ends_k=ends_k,
        max_q=max(queries),
        max_k=max(keys),
    )


def varlen_attention(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: Tree,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of a whole row through one call of `kernel`, which `kernel_for` chose.

    Args:
        query: [1, heads, tokens, channels].
        key: [1, heads or a divisor of it, tokens, channels]; value: the same.
        scale: that scores are multiplied with; None: one over the root of the channels.
        window: how many tokens each one sees, itself among them; None: all before it.

    Returns:
        [1, tokens, heads, channels], in the precision that autocast computes in, where it is on.
    """
    layout = layout_of(tree, query.device)
    dtype = _dtype(query)
    queries = query.squeeze(0).transpose(0, 1).to(dtype)
    keys, values = (_gathered(each.squeeze(0).transpose(0, 1), layout.keys, dtype) for each in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    narrow = window if window is not None and layout.max_k > window else None
    return kernel(queries, keys, values, layout, scale, narrow).unsqueeze(0)


def _gathered(row: torch.Tensor, index: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if index is None:
        return row.to(dtype)
    # By way of float32, so that the gradients of all that continue a segment are summed in it.
    return row.float().index_select(0, index).to(dtype)


def _dtype(query: torch.Tensor) -> torch.dtype:
    """As under `scaled_dot_product_attention`, which autocast runs in half precision."""
    kind = query.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else query.dtype


def kernel_for(query: torch.Tensor, tree: Tree, dropout: float) -> Kernel | None:
    """The kernel that takes a row in one call on the device of `query`; None where there is none for it.

    Args:
        query: [1, heads, tokens, channels].
        tree: the row's samples.
        dropout: of attention weights.
    """
    kind = query.device.type
    if kind not in ("cuda", "npu") or dropout or _dtype(query) not in HALVES:
        return None
    if any(segment.blocks for segment in tree.segments):
        return None
    if kind == "cuda":
        return cuda_kernel if _flash_takes(query) else None
    return npu_kernel if _fusion_takes(query, len(tree.segments)) else None


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    """The one of torch: there since 2.10, with all the keywords that are needed here since 2.12.

    Imported when it is asked for: it brings the compiler with it, which a CPU has no use for.
    """
    try:
        found: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return found if {"scale", "window_size", "enable_gqa"} <= inspect.signature(found).parameters.keys() else None


def _flash_takes(query: torch.Tensor) -> bool:
    """By the conditions of flash attention in torch's `sdp_utils.cpp`."""
    channels = query.shape[-1]
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        return False
    if channels % 8 or channels > 256 or _varlen_attn() is None:
        return False
    major, minor = torch.cuda.get_device_capability(query.device)
    # The backward of more than 192 channels needs the shared memory of the large chips: not 8.6, 8.9 or 12.x.
    return major >= 8 and (channels <= 192 or (minor == 0 and major < 12))


def cuda_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, window: int | None
) -> torch.Tensor:
    """Flash attention for unequal lengths as torch has it, a `Kernel`.

    Causal is aligned at the lower right there, since flash-attention 2.1; torch's `causal_lower_right` is built on it.
    A window counts the tokens before a query, not the query itself.
    """
    attend = _varlen_attn()
    assert attend is not None, "kernel_for offers it only where torch has it"
    out: torch.Tensor = attend(
        query,
        key,
        value,
        layout.cumulative_q,
        layout.cumulative_k,
        layout.max_q,
        layout.max_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out


RIGHT_DOWN_CAUSAL, BAND = 3, 4
"""`sparse_mode` of npu_fusion_attention: causal from the lower right; the same with a limit on what is before."""


def _fusion_attention() -> Callable[..., Any] | None:
    # A tensor on an NPU comes with the module imported.
    return getattr(sys.modules.get("torch_npu"), "npu_fusion_attention", None)


def _fusion_takes(query: torch.Tensor, segments: int) -> bool:
    """By its documentation: channels in sixteens, and at most 2,048 sequences in a call."""
    channels = query.shape[-1]
    return _fusion_attention() is not None and channels % 16 == 0 and channels <= 256 and segments <= 2048


def npu_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scale: float, window: int | None
) -> torch.Tensor:
    """Ascend's fused attention in its layout for unequal lengths (TND), a `Kernel`.

    Called as transformers' `integrations/npu_flash_attention.py` does; fewer heads of keys need no argument. A band's
    `pre_tockens` counts the tokens before a query, not the query itself.
    """
    attend = _fusion_attention()
    assert attend is not None, "kernel_for offers it only where torch_npu is there"
    banded = {} if window is None else {"pre_tockens": window - 1, "next_tockens": 0}
    out: torch.Tensor = attend(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        query.shape[1],
        "TND",
        atten_mask=_npu_mask(query.device),
        scale=scale,
        actual_seq_qlen=layout.ends_q,
        actual_seq_kvlen=layout.ends_k,
        sparse_mode=RIGHT_DOWN_CAUSAL if window is None else BAND,
        **banded,
    )[0]
    return out


@cache
def _npu_mask(device: torch.device) -> torch.Tensor:
    """The form that both modes take their mask in, whatever the lengths: True is not seen."""
    with torch.inference_mode(False):
        return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
