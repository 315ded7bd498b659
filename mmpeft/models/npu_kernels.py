"""Norms, gated activations and rotary positions by Ascend's fused operators, where a model computes on an NPU.

    norm            float32, square, mean, root, product, cast, times weight      npu_rms_norm
    feed-forward    silu(gate(x)) * up(x), between projections that stay          npu_swiglu
    attention       q * cos + turned(q) * sin, and the same of k                  npu_rotary_mul

The hooks that transformers 5.24 has for norms and rotary positions (`use_kernel_forward_from_hub`) do nothing without
the package `kernels`, and with it take what the Hub offers; so instances of the modules get another forward. Which
modules compute what an operator computes is found by trying: one of each kind, with a few weights of its own, on the
CPU. Gemma's norms, which multiply by 1 + weight, other activations and positions turned in part stay as they are.

Signatures and limits are those that op-plugin documents at 517f2e7d (docs/zh/custom_APIs/torch_npu); written from there
and run on a simulation, never on Ascend hardware. In half precision numbers are rounded once where modules round twice.
"""

import contextlib
import copy
import functools
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.activations import ACT2CLS

OPERATORS = ("npu_rms_norm", "npu_swiglu", "npu_rotary_mul")
"""Of torch_npu; all of them are in it since torch 2.1."""

ROTARY = "apply_rotary_pos_emb"
"""What modeling files of transformers call the function that turns queries and keys."""

MOST_CHANNELS, MOST_ROWS, ALIGNED_BYTES = 895, 999, 32
"""Of npu_rotary_mul: channels of a head, rows and heads of a batch; and what a head's bytes are a multiple of, for else
it is slower than the operations that it stands for."""

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
_ACTIVATIONS = ("act_fn", "activation_fn")
_DEPRECATIONS = "transformers.utils.deprecation"


@dataclass(frozen=True, kw_only=True)
class FusedModules:
    """How many modules compute by fused operators: norms, feed-forward parts, attentions."""

    norms: int = 0
    activations: int = 0
    rotations: int = 0

    @property
    def total(self) -> int:
        """Of all kinds."""
        return self.norms + self.activations + self.rotations


@contextlib.contextmanager
def npu_kernels_on(model: torch.nn.Module) -> Iterator[FusedModules]:
    """Let what lies on an NPU compute by fused operators while it lasts; elsewhere, modules compute as they do.

    Outputs, and gradients of inputs and weights, are those of the modules but for rounding. Weights may be spread over
    processes, and projections wrapped in LoRA: modules are called as before, with their hooks.

    Yields:
        How many modules do; none without torch-npu.
    """
    # A tensor on an NPU comes with the module imported.
    torch_npu = sys.modules.get("torch_npu")
    owned: list[Any] = []
    counts = dict.fromkeys(("norms", "activations", "rotations"), 0)
    if all(hasattr(torch_npu, name) for name in OPERATORS):
        judged: dict[Any, bool] = {}
        narrow = _within_one(model)
        for module in model.modules():
            found = _fused(module, torch_npu, judged) if "forward" not in vars(module) else None
            if found is None or (found[0] == "rotations" and not narrow):
                continue
            kind, forward = found
            # On the instance: its call, and so all hooks, stay.
            module.forward = forward
            owned.append(module)
            counts[kind] += 1
    try:
        yield FusedModules(**counts)
    finally:
        for module in owned:
            del module.forward


def _fused(module: Any, operators: Any, judged: dict[Any, bool]) -> tuple[str, Callable[..., Any]] | None:
    """What a module computes, and its forward by an operator; None for a module that computes something else.

    Args:
        operators: the module torch_npu.
        judged: what was tried already, by kind of module.
    """
    own = module.forward
    if (epsilon := _epsilon(module)) is not None:
        if _passes(judged, (type(module), _size(module), epsilon), lambda: _normalises(module, epsilon)):
            return "norms", functools.partial(_normalise, module, own, operators.npu_rms_norm, epsilon)
    elif (activation := _gate(module)) is not None:
        if _passes(judged, (type(module), activation), lambda: _is_gated(module, activation)):
            return "activations", functools.partial(_gated, module, own, operators.npu_swiglu)
    elif (attend := _turning(module)) is not None:
        turn = attend.__globals__[ROTARY]
        if _passes(judged, turn, lambda: _turns_halves(turn)):
            fused = functools.partial(_turn, turn, operators.npu_rotary_mul)
            return "rotations", _with_rotary(module, own, attend, fused)
    return None


def _passes(judged: dict[Any, bool], key: Any, probe: Callable[[], bool]) -> bool:
    if key not in judged:
        try:
            with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                judged[key] = probe()
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            # It takes other inputs than what it is tried for.
            judged[key] = False
    return judged[key]


def _close(found: Any, expected: torch.Tensor) -> bool:
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected, 1e-4)


def _trial(module: Any, **changes: Any) -> Any:
    """A module of the same kind with other parameters or parts."""
    trial = copy.copy(module)
    for name, change in changes.items():
        trial.__dict__[name] = change
    return trial


# Norms


def _epsilon(module: Any) -> float | None:
    """Of a module that has one vector of weights and nothing else; None for others."""
    weight = module._parameters.get("weight")
    if weight is None or len(module._parameters) > 1 or module._buffers or module._modules or len(_shape(weight)) != 1:
        return None
    return next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)


def _shape(weight: Any) -> torch.Size:
    # DeepSpeed's stage 3 keeps an empty tensor in its place.
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def _size(module: Any) -> int:
    return _shape(module._parameters["weight"])[0]


def _normalises(module: Any, epsilon: float) -> bool:
    size = _size(module)
    weight = torch.rand(size) + 0.5
    # One of them so small that a wrong epsilon shows.
    states = torch.randn(2, 3, size) * torch.tensor([1.0, epsilon**0.5])[:, None, None]
    expected = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon) * weight
    return _close(type(module).forward(_trial(module, _parameters={"weight": weight}), states), expected)


def _normalise(
    module: Any, own: Callable[..., Any], operator: Any, epsilon: float, states: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    if args or kwargs or states.device.type != "npu" or states.dim() < 2:
        return own(states, *args, **kwargs)
    # The operator takes both in one precision.
    weight = module.weight
    dtype = torch.promote_types(states.dtype, weight.dtype)
    return operator(states.to(dtype), weight.to(dtype), epsilon=epsilon)[0]


# Feed-forward parts


def _gate(module: Any) -> str | None:
    """The name of SiLU in a module of it and two or three projections; None for others."""
    name = next((name for name in _ACTIVATIONS if name in module._modules), None)
    if name is None or module._parameters or type(module._modules[name]) not in (torch.nn.SiLU, ACT2CLS["silu"]):
        return None
    parts = module._modules.keys() - {name}
    return name if parts in ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}) else None


def _is_gated(module: Any, activation: str) -> bool:
    gate, up, down = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6), torch.nn.Linear(6, 4)
    if "gate_proj" in module._modules:
        into = {"gate_proj": gate, "up_proj": up}
    else:
        both = torch.nn.Linear(4, 12)
        both.weight.copy_(torch.cat((gate.weight, up.weight)))
        both.bias.copy_(torch.cat((gate.bias, up.bias)))
        into = {"gate_up_proj": both}
    parts = {**into, "down_proj": down, activation: module._modules[activation]}
    states = torch.randn(2, 3, 4)
    expected = down(torch.nn.functional.silu(gate(states)) * up(states))
    return _close(type(module).forward(_trial(module, _modules=parts), states), expected)


def _gated(module: Any, own: Callable[..., Any], operator: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args or kwargs or states.device.type != "npu" or not states.numel():
        return own(states, *args, **kwargs)
    if "gate_up_proj" in module._modules:
        both = module.gate_up_proj(states).contiguous()
    else:
        both = torch.cat((module.gate_proj(states), module.up_proj(states)), -1)
    return module.down_proj(operator(both, dim=-1))


# Attentions


def _turning(module: Any) -> types.FunctionType | None:
    """The forward of a module's class that turns by a function of its file; None for others."""
    forward: Any = type(module).forward
    while getattr(forward, "__globals__", {}).get("__name__") == _DEPRECATIONS and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    known = isinstance(forward, types.FunctionType) and callable(forward.__globals__.get(ROTARY))
    return forward if known and ROTARY in forward.__code__.co_names else None


def _turns_halves(turn: Callable[..., Any]) -> bool:
    query, key, cos, sin = torch.randn(2, 4, 3, 8), torch.randn(2, 1, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)

    def expected(states: torch.Tensor) -> torch.Tensor:
        first, second = states.chunk(2, -1)
        return states * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    found = turn(query, key, cos, sin)
    return len(found) == 2 and _close(found[0], expected(query)) and _close(found[1], expected(key))


def _within_one(model: torch.nn.Module) -> bool:
    """Whether cosines and sines are: long contexts (YaRN) stretch them, and the operator takes those from -1 to 1."""
    scales = (
        value for each in model.modules() for name, value in vars(each).items() if name.endswith("attention_scaling")
    )
    return all(value == 1.0 for value in scales)


def _with_rotary(
    module: Any, own: Callable[..., Any], attend: types.FunctionType, turn: Callable[..., Any]
) -> Callable[..., Any]:
    """The forward of a module's class with another function that turns; the file's own stays."""
    known = {**attend.__globals__, ROTARY: turn}
    changed = types.FunctionType(attend.__code__, known, attend.__name__, attend.__defaults__, attend.__closure__)
    changed.__kwdefaults__ = attend.__kwdefaults__

    def forward(*args: Any, **kwargs: Any) -> Any:
        # An old name of an argument, which the class's decorator knows.
        return own(*args, **kwargs) if "past_key_values" in kwargs else changed(module, *args, **kwargs)

    return forward


def _turn(
    own: Callable[..., Any],
    operator: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Queries [rows, heads, tokens, channels] and keys by cosines and sines [rows, tokens, channels]."""
    if args or kwargs or not (_turnable(query, cos) and _turnable(key, cos)):
        return own(query, key, cos, sin, *args, **kwargs)
    cosines, sines = cos.unsqueeze(1), sin.unsqueeze(1)
    return operator(query.contiguous(), cosines, sines), operator(key.contiguous(), cosines, sines)


def _turnable(states: torch.Tensor, cos: torch.Tensor) -> bool:
    if states.device.type != "npu" or states.dim() != 4 or cos.dim() != 3 or cos.requires_grad:
        return False
    rows, heads, _, channels = states.shape
    return (
        states.dtype == cos.dtype
        and channels == cos.shape[-1] <= MOST_CHANNELS
        and channels * states.itemsize % ALIGNED_BYTES == 0
        and max(rows, heads) <= MOST_ROWS
    )
