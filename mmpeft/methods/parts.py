"""Where the parts of a model stand in its tree of modules."""

from typing import Any

from torch import nn

from mmpeft.core.types import Part
from mmpeft.families.registry import family_of
from mmpeft.methods.plan import base_name
from mmpeft.models.base import base_of


def whole_modules(model: Any) -> list[nn.Module]:
    """The outermost modules that are no part of the language model and in which nothing trains: towers, mostly.

    They may run by themselves, in one process and not in another: for kept features, and not at all on text alone.
    """
    base = base_of(model)
    spec = family_of(base)
    parts: dict[nn.Module, set[Part | None]] = {}
    trains: set[nn.Module] = set()
    modules = dict(base.named_modules())
    for name, parameter in base.named_parameters():
        above = name
        while above:
            above = above.rpartition(".")[0]
            module = modules[above]
            parts.setdefault(module, set()).add(spec.part_of(base_name(name)))
            if parameter.requires_grad:
                trains.add(module)

    def outermost(module: nn.Module) -> list[nn.Module]:
        found = parts.get(module, set())
        if found and found <= {"vision", "audio", "projector"} and module not in trains:
            return [module]
        return [each for child in module.children() for each in outermost(child)]

    return outermost(base)
