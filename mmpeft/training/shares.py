"""What several processes do with a model of which each has but a share, or an adapter that all have whole."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from mmpeft.core.optional import require
from mmpeft.methods.parts import whole_modules
from mmpeft.models.sharded import is_sharded

_BUCKET_BYTES = 1 << 26
"""Gradients that are sent at once."""


def average_gradients(
    parameters: Iterable[nn.Parameter], *, in_parts: Iterable[nn.Parameter] = (), parts: int = 1
) -> None:
    """Give all processes the mean of their gradients, of weights that all of them have whole.

    Args:
        in_parts: those of which each process of a group has but a part of the gradient; their sum is the whole.
        parts: processes of such a group.

    Where only some have a gradient, for others had text alone, it counts as zero there; where none has one, none gets
    one, and the optimizer passes over it as on one process.
    """
    trained = [each for each in parameters if each.requires_grad and not isinstance(each.data, DTensor)]
    if not trained:
        return
    reached = torch.tensor([each.grad is not None for each in trained], dtype=torch.uint8, device=trained[0].device)
    distributed.all_reduce(reached, op=distributed.ReduceOp.MAX)
    waiting: list[torch.Tensor] = []
    size = 0
    for parameter, somewhere in zip(trained, reached.tolist(), strict=True):
        if not somewhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if waiting and (waiting[0].dtype != parameter.grad.dtype or size > _BUCKET_BYTES):
            _average(waiting)
            waiting, size = [], 0
        waiting.append(parameter.grad)
        size += parameter.grad.nbytes
    if waiting:
        _average(waiting)
    for parameter in in_parts:
        if parameter.grad is not None:
            parameter.grad *= parts


def _average(gradients: list[torch.Tensor]) -> None:
    flat = torch.cat([each.flatten() for each in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    pieces = flat.split([each.numel() for each in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view_as(gradient))


@contextlib.contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While it lasts, weights that ZeRO-3 has shared out are whole in every process; each has to ask."""
    shares = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shares:
        yield
        return
    with require("deepspeed", extra="deepspeed").zero.GatheredParameters(shares):
        yield


@contextlib.contextmanager
def backward_through_layers(model: Any) -> Iterator[None]:
    """While it lasts, backward goes through every layer of a model whose layers are shared out, on text alone too.

    Where nothing in front of the language model trains on a micro-batch, backward would end above the first layer, and
    another process that has pictures would wait for this one's share of it.
    """
    if not is_sharded(model):
        yield
        return
    source: list[torch.Tensor] = []

    def differentiable(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        if not torch.is_grad_enabled() or output.requires_grad:
            return None
        if not source:
            source.append(torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True))
        # Not `requires_grad_`: families write features into these in place, which leaves refuse.
        return output + source[0]

    hook = model.get_input_embeddings().register_forward_hook(differentiable)
    try:
        yield
    finally:
        hook.remove()


def adapter_parameters(model: Any) -> list[nn.Parameter]:
    """Of a `PeftModel` those that its adapter holds; of another model those that train."""
    if not isinstance(model, PeftModel):
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name or ".modules_to_save." in name or parameter.requires_grad
    ]


@torch.no_grad()
def keep_whole(model: Any) -> None:
    """Give every process the whole of what ZeRO-3 need not share out: see `whole_modules`."""
    for module in whole_modules(model):
        for child in module.modules():
            own = dict(child.named_parameters(recurse=False))
            with gathered(own.values()):
                copies = {name: parameter.detach().clone() for name, parameter in own.items()}
            for name, parameter in own.items():
                if hasattr(parameter, "ds_id"):
                    setattr(child, name, nn.Parameter(copies[name], requires_grad=parameter.requires_grad))


@contextlib.contextmanager
def whole_hidden(accelerator: Any, model: Any) -> Iterator[None]:
    """While it lasts, ZeRO-3 takes no notice of what stays whole in every process.

    It walks the whole module tree when it is set up, behind each step, and for checkpoints.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None or plugin.zero_stage != 3:
        yield
        return

    def hiding(call: Callable[..., Any]) -> Callable[..., Any]:
        def without(*args: Any, **kwargs: Any) -> Any:
            with _hidden(model):
                return call(*args, **kwargs)

        return without

    prepare = accelerator._prepare_deepspeed

    def prepared(*args: Any, **kwargs: Any) -> Any:
        with _hidden(model):
            result = prepare(*args, **kwargs)
        engine = accelerator.deepspeed_engine_wrapped.engine
        offload = engine.optimizer.parameter_offload
        offload.partition_all_parameters = hiding(offload.partition_all_parameters)
        for name in ("save_checkpoint", "load_checkpoint"):
            setattr(engine, name, functools.wraps(getattr(engine, name))(hiding(getattr(engine, name))))
        return result

    accelerator._prepare_deepspeed = prepared
    try:
        yield
    finally:
        del accelerator._prepare_deepspeed


@contextlib.contextmanager
def _hidden(model: Any) -> Iterator[None]:
    names = {module: name for name, module in model.named_modules()}
    places = [names[module].rpartition(".") for module in whole_modules(model)]
    taken = [(model.get_submodule(parent), child) for parent, _, child in places]
    kept = [(parent, dict(parent._modules)) for parent, _ in taken]
    for parent, child in taken:
        parent._modules[child] = None
    try:
        yield
    finally:
        for parent, modules in kept:
            parent._modules.update(modules)
