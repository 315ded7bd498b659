"""What mmpeft has to know of a model family: facts, and the few functions that need the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from mmpeft.core.types import Part


def leaves_with_parameters(module: nn.Module, prefix: str) -> list[str]:
    """Names of the outermost modules under `module` that hold parameters of their own.

        multi_modal_projector            no parameters of its own: look inside
        |- linear_1  (weight, bias)      -> "multi_modal_projector.linear_1"
        |- act                           no parameters at all
        '- linear_2  (weight, bias)      -> "multi_modal_projector.linear_2"

    Leaves, not the projector as a whole, are what PEFT's `modules_to_save` must name: with the whole
    projector, batches of mixed adapters (`adapter_names=[...]`) raise TypeError in peft 0.21.
    """
    if any(True for _ in module.parameters(recurse=False)):
        return [prefix]
    return [
        name
        for child, submodule in module.named_children()
        for name in leaves_with_parameters(submodule, f"{prefix}.{child}")
    ]


def all_projector_leaves(model: nn.Module, spec: "FamilySpec") -> list[str]:
    """Every parameter-holding leaf under the projector's paths."""
    return [
        name for path in spec.parts["projector"] for name in leaves_with_parameters(model.get_submodule(path), path)
    ]


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """The facts of one family.

    Attributes:
        name: what `mmpeft families` and `adapters/<name>/` call it.
        model_types: values of `config.model_type` that belong to it.
        parts: for each part, the module paths that hold it, as `model.named_modules()` prints them.
        projector_leaves: names the projector's trainable leaf modules in a given model.
    """

    name: str
    model_types: tuple[str, ...]
    parts: Mapping[Part, tuple[str, ...]]
    projector_leaves: Callable[[nn.Module, "FamilySpec"], list[str]] = all_projector_leaves

    def part_of(self, name: str) -> Part | None:
        """The part that a module or parameter name belongs to; None if to no part."""
        for part, paths in self.parts.items():
            if any(name == path or name.startswith(f"{path}.") for path in paths):
                return part
        return None
