"""Batches that use nothing that trains, such as text alone where the projector trains by itself."""

from typing import Any

import torch


def reach_what_trains(model: torch.nn.Module, inputs: Any, output: Any) -> None:
    """Join a forward that uses nothing that trains to all that does, with gradients of exactly zero; a forward hook.

    Else backward would find no graph, and the other processes would wait for gradients that do not come. It has to
    happen inside the forward, where DDP looks for them. A forward that uses some of what trains is left alone: DDP
    finds the rest by itself, and an optimizer passes over what has no gradient, as it does on one process.
    """
    if not torch.is_grad_enabled():
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name in ("loss", "logits"):
        value = output.get(name)
        if value is not None and not _reaches(value, trained, model):
            output[name] = value + 0 * sum(parameter.float().sum() for parameter in trained)


def _reaches(value: torch.Tensor, trained: list[torch.nn.Parameter], model: torch.nn.Module) -> bool:
    """Whether the gradient of `value` comes to any parameter that trains."""
    if not value.requires_grad:
        return False
    # Activation checkpointing makes the embeddings ask for a gradient, so that there is a graph without a parameter.
    if not getattr(model, "is_activation_checkpointing", False):
        return True
    wanted = {id(parameter) for parameter in trained}
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        nodes += [following for following, _ in node.next_functions]
    return False
