"""LoRA's two small products added to the large one in place: less memory is written and read than one by one.

    PEFT      y = x W'      z = x A'      u = z B'      v = s u      y + v         five tensors, three of y's size
    here      y = x W'      z = x A'      y += s z B'                              two, one of y's size

and in the backward the like for the input's gradient. The numbers are those of PEFT but for the order of sums.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable


@contextlib.contextmanager
def lora_fused(model: torch.nn.Module) -> Iterator[int]:
    """Let the LoRA layers of a model compute fused where they can; the rest runs as PEFT has it.

    Those can that are plain: a `torch.nn.Linear` which nothing hooks into, without dropout, DoRA or another variant.
    Weights must be whole while it lasts, not spread over processes.

    Yields:
        How many layers.
    """
    layers = [module for module in model.modules() if type(module) is Linear and _plain(module)]
    for layer in layers:
        # On the instance, as accelerate's hooks do.
        layer.forward = _fused(layer, layer.forward)  # type: ignore[method-assign]
    try:
        yield len(layers)
    finally:
        for layer in layers:
            del layer.forward


def _plain(layer: Linear) -> bool:
    base = layer.base_layer
    parts: list[Any] = [base, *layer.lora_A.values(), *layer.lora_B.values()]
    return (
        "forward" not in vars(layer)
        and not (layer.lora_variant or any(layer.lora_bias.values()))
        and all(type(each) is torch.nn.Identity for each in layer.lora_dropout.values())
        and all(type(part) is torch.nn.Linear and not _hooked(part) for part in parts)
        and not any(weight.requires_grad for weight in base.parameters())
    )


def _hooked(module: torch.nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(hooks)


def _fused(layer: Linear, own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The forward of a layer.

    Args:
        own: the one that it has, for what is not plain after all.
    """

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = _adapter(layer)
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        if args or kwargs or adapter is None:
            return own(x, *args, **kwargs)
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if weight.dtype != dtype or not (autocast or down.dtype == up.dtype == dtype):
            return own(x)
        with torch.autocast(x.device.type, enabled=False):
            y: torch.Tensor = _Added.apply(x.to(dtype), weight, bias, down, up, layer.scaling[adapter])
        return y

    return forward


def _adapter(layer: Linear) -> str | None:
    """The one adapter that a layer adds now; None if it is none, several, or merged."""
    if layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    return active[0] if len(active) == 1 else None


class _Added(torch.autograd.Function):
    """x W' + bias + scale x A' B', of x [..., in], frozen W [out, in] and trainable A [rank, in], B [out, rank].

    A and B may be in float32 where x is in half precision, and then so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        low, high = down.to(x.dtype), up.to(x.dtype)
        inner = rows @ low.t()
        y = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        y.addmm_(inner, high.t(), alpha=scale)
        ctx.save_for_backward(rows, inner, weight, low, high)
        ctx.scale, ctx.shape, ctx.formats = scale, x.shape, (down.dtype, up.dtype)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, weight, low, high = ctx.saved_tensors
        out = gradient.flatten(0, -2)
        through = out @ high
        of_x = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            of_x = (out @ weight).addmm_(through, low, alpha=ctx.scale).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            of_down = (through.t() @ rows).to(ctx.formats[0]).mul_(ctx.scale)
        if ctx.needs_input_grad[4]:
            of_up = (out.t() @ inner).to(ctx.formats[1]).mul_(ctx.scale)
        return of_x, None, None, of_down, of_up, None
