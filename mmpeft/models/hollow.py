"""A model without storage: its operations run by shape alone, and what their tensors would take is counted.

    hollow_model(model)      each weight a tensor with a shape, a type and a device, and nothing behind it
    with Hollow() as hollow: each tensor that a step makes is counted when it is made and when it is let go

    integers, truths         are real, for models read them: which tokens stand for a picture, how long rows are
    all other numbers        are hollow; a real one that meets a hollow one becomes hollow

Kernels are those of the device that a hollow tensor says it is on, so attention keeps what that device's kernel keeps.
Not counted is what kernels take inside themselves, and what an allocator loses between blocks.
"""

import functools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Kind = Literal["weights", "gradients", "optimizer", "batch", "logits", "activations"]

KINDS: tuple[Kind, ...] = get_args(Kind)

_SMALL = 1 << 16
"""Entries up to which a tensor that depends on no hollow one is made for real."""


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The moment at which most stood in memory.

    Attributes:
        bytes: of all tensors.
        kinds: of each kind of them, at that moment.
        largest: the most bytes of one tensor that was made since the peak was last forgotten.
    """

    bytes: int
    kinds: Mapping[Kind, int]
    largest: int


class HollowTensor(torch.Tensor):
    """A tensor that says it is on a device, and has nothing but its `shape` on the meta device behind it.

    It is what `torch._subclasses.FakeTensor` is, without what tracing needs, and so ten times as quick.
    """

    behind: torch.Tensor

    @staticmethod
    def __new__(cls, behind: torch.Tensor, device: torch.device, *, requires_grad: bool = False) -> "HollowTensor":
        """One of the size, strides and type of `behind`, a tensor on the meta device."""
        made: HollowTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            behind.shape,
            strides=behind.stride(),
            storage_offset=behind.storage_offset(),
            dtype=behind.dtype,
            layout=behind.layout,
            device=device,
            requires_grad=requires_grad,
        )
        made.behind = behind
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        """Its shape; it has no numbers."""
        return f"HollowTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on what is behind its arguments."""
        return _run_hollow(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _run_hollow(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    device: list[torch.device] = []
    real = func._overloadpacket not in _INDEXING

    def bare(value: Any) -> Any:
        if isinstance(value, HollowTensor):
            device.append(value.device)
            return value.behind
        if isinstance(value, torch.Tensor):
            return value.to("meta") if real or value.dtype != torch.bool else value
        if isinstance(value, (list, tuple)):
            return type(value)(map(bare, value)) if type(value) in (list, tuple) else value
        return value

    given = [bare(value) for value in args]
    named = {key: bare(value) for key, value in kwargs.items()}
    if not real:
        given[1] = _places(given[1])
    if isinstance(named.get("device"), torch.device):
        named["device"] = torch.device("meta")
    out = func(*given, **named)
    if func._schema.is_mutable:
        # What was changed in place is what comes back.
        pairs = zip([*given, *named.values()], [*args, *kwargs.values()], strict=True)
        changed = {id(behind): value for behind, value in pairs}
        if not isinstance(out, (list, tuple)):
            return changed.get(id(out), out)
    return _wrapped(out, device[0])


def _wrapped(out: Any, device: torch.device) -> Any:
    if isinstance(out, torch.Tensor):
        return HollowTensor(out, device) if out.is_meta else out
    if isinstance(out, (list, tuple)):
        return type(out)(_wrapped(value, device) for value in out)
    return out


def _tensors_in(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


class Hollow(TorchDispatchMode):
    """Counts the tensors of what runs within it.

    Args:
        device: that of hollow tensors.
        vocabulary: tensors with so many columns are logits; 0: none are.

    Attributes:
        flop: floating-point operations of matrix products, convolutions and attention so far.
    """

    def __init__(self, device: torch.device, *, vocabulary: int = 0) -> None:
        super().__init__()
        # With its number, as real tensors name theirs: what compares the two takes `npu` and `npu:0` for different.
        numbered = device.type == "cpu" or device.index is not None
        self.device = device if numbered else torch.device(device.type, 0)
        self.vocabulary = vocabulary
        self.flop = 0
        self._live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._known: dict[int, tuple[Any, Kind, int]] = {}
        self._total = self._largest = 0
        self._peak = Peak(bytes=0, kinds=dict(self._live), largest=0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation, and count what it has made."""
        kwargs = kwargs or {}
        if any(isinstance(tensor, HollowTensor) for tensor in _tensors_in((args, tuple(kwargs.values())))):
            out = _run_hollow(func, args, kwargs)
        elif _is_large(func, args, kwargs):
            out = HollowTensor(func(*args, **{**kwargs, "device": torch.device("meta")}), self.device)
        else:
            out = func(*args, **kwargs)
        self._count_work(func, args, kwargs, out)
        for tensor in _tensors_in((out,)):
            self.hold(tensor, self._kind(tensor))
        return out

    @property
    def live(self) -> dict[Kind, int]:
        """Bytes that stand now, by kind."""
        return dict(self._live)

    @property
    def peak(self) -> Peak:
        """The most that stood at once since it was last forgotten."""
        return self._peak

    def forget_peak(self) -> None:
        """Look for the peak of what comes from now on."""
        self._largest = 0
        self._peak = Peak(bytes=self._total, kinds=dict(self._live), largest=0)

    def hold(self, tensor: torch.Tensor, kind: Kind) -> None:
        """Count a tensor that was made elsewhere; one that is counted already stays of its kind."""
        storage = _storage(tensor)
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, functools.partial(self._let_go, key)), kind, size)
        self._add(kind, size)

    def name(self, tensor: torch.Tensor, kind: Kind) -> None:
        """Say of what kind a tensor is that is counted already, or count it."""
        key = _storage(tensor)._cdata
        if key not in self._known:
            self.hold(tensor, kind)
            return
        reference, before, size = self._known[key]
        self._known[key] = (reference, kind, size)
        self._live[before] -= size
        self._live[kind] += size

    def _add(self, kind: Kind, size: int) -> None:
        self._live[kind] += size
        self._total += size
        self._largest = max(self._largest, size)
        if self._total > self._peak.bytes:
            self._peak = Peak(bytes=self._total, kinds=dict(self._live), largest=self._largest)

    def _let_go(self, key: int, _: Any) -> None:
        _, kind, size = self._known.pop(key)
        self._live[kind] -= size
        self._total -= size

    def _kind(self, tensor: torch.Tensor) -> Kind:
        wide = self.vocabulary and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        return "logits" if wide and tensor.is_floating_point() else "activations"

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        count = _FLOP.get(getattr(func, "_overloadpacket", func))
        if count is not None:
            self.flop += int(count(*args, **kwargs, out_val=out))


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape))


_FLOP: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **flop_registry,
}


def _storage(tensor: torch.Tensor) -> Any:
    return (tensor.behind if isinstance(tensor, HollowTensor) else tensor).untyped_storage()


def _places(given: Any) -> list[Any]:
    """Truths as indices replaced by the places where they hold: a tensor without storage cannot look for them."""
    indices: list[Any] = []
    for index in given:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not index.is_meta:
            indices += [place.to("meta") for place in index.nonzero(as_tuple=True)]
        else:
            indices.append(index)
    return indices


_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _is_large(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation that makes a tensor of nothing makes a large one of real numbers."""
    shape = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    if not all(isinstance(size, int) for size in shape):
        return False
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return bool(dtype.is_floating_point and torch.Size(shape).numel() > _SMALL)


def hollow_model(model: Any, hollow: Hollow) -> None:
    """Make each weight of a model on the meta device hollow, in place, and count it; those that are shared stay so."""
    # A Trainer would move it.
    model.to = lambda *_, **__: model
    made: dict[int, Any] = {}
    for owner, name, tensor in _tensors(model):
        if id(tensor) not in made:
            empty = HollowTensor(tensor.detach(), hollow.device)
            trains = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if trains else empty
            hollow.hold(made[id(tensor)], "weights")
        table = owner._parameters if name in owner._parameters else owner._buffers
        table[name] = made[id(tensor)]


def hollow_tensor(tensor: torch.Tensor, hollow: Hollow) -> torch.Tensor:
    """A batch's tensor: hollow if it holds real numbers, else as it is."""
    return HollowTensor(tensor.to("meta"), hollow.device) if tensor.is_floating_point() else tensor


def _tensors(model: nn.Module) -> Iterator[tuple[Any, str, torch.Tensor]]:
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is not None:
                    yield module, name, tensor
