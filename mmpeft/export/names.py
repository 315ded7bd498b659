"""Which parameter of a model each tensor of its checkpoint goes into: transformers renames and rearranges on loading.

    on disk                                         in the model
    language_model.model.layers.0.mlp.up_proj  ->   model.language_model.layers.0.mlp.up_proj        renamed
    layers.0.experts.0.up_proj     |
    layers.0.experts.1.up_proj     |            ->  layers.0.experts.gate_up_proj                    rearranged
    layers.0.experts.0.gate_proj ...

Rearranged tensors are a `Group`: all of them make one or several parameters together, and the other way round.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from mmpeft.core.errors import ModelError


@dataclass
class Group:
    """Tensors of a checkpoint that make parameters together.

    Attributes:
        parameter: the first of the parameters that they make.
        converter: the rule of transformers that rearranges them.
        stored: their names in the checkpoint, by their names before the rule.
        patterns: by the same names, the pattern of the rule that each matches.
    """

    parameter: str
    converter: Any
    stored: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)


class StoredNames:
    """The names of a checkpoint's tensors beside those of a model's parameters.

    Args:
        model: the model, with weights or without.
        stored: names of all tensors of the checkpoint.

    Attributes:
        parameters: by the name of each tensor that is a parameter (or buffer) as it stands, that one's name. What the
            model has no place for is not there.
        groups: by the name of each tensor that is rearranged, its group.
    """

    def __init__(self, model: PreTrainedModel, stored: Iterable[str]) -> None:
        self._model = model
        self._places: Mapping[str, Any] = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._back: list[Any] = [rule.reverse_transform() for rule in reversed(self._renamings)]
        self.parameters: dict[str, str] = {}
        self.groups: dict[str, Group] = {}
        groups: dict[str, Group] = {}
        # Some rules depend on names that came before, so the order is that in which transformers goes through them.
        for name in sorted(stored, key=dot_natural_key):
            parameter, pattern = self._parameter(name)
            if parameter in self._places and pattern is not None:
                rule = next(rule for rule in self._converters if pattern in rule.source_patterns)
                group = groups.setdefault(parameter, Group(parameter, rule))
                before = apply_renamings(name, self._renamings)
                group.stored[before], group.patterns[before] = name, pattern
                self.groups[name] = group
            elif parameter in self._places:
                self.parameters[name] = parameter

    def _parameter(self, name: str) -> tuple[str, str | None]:
        """The parameter that a stored name leads to, and the pattern of a rule that rearranges it.

        As `convert_and_load_state_dict_in_model` of transformers 5.24 goes about it.
        """
        prefix = self._model.base_model_prefix
        found, pattern = rename_source_key(name, self._renamings, self._converters, prefix, dict(self._places))
        if found not in self._places and name in self._places:
            found, pattern = rename_source_key(name, [], [], prefix, dict(self._places))
        return found, pattern

    def parameter_of(self, name: str) -> str | None:
        """The parameter (or buffer) that a tensor of this name would be; None where there is none."""
        found, pattern = self._parameter(name)
        return found if pattern is None and found in self._places else None

    def stored_name(self, parameter: str) -> str:
        """The name under which a checkpoint of this layout has a parameter that it lacks so far.

        Raises:
            ModelError: no name leads to the parameter.
        """
        for name in (apply_renamings(parameter, self._back), parameter):
            if self._parameter(name) == (parameter, None):
                return name
        raise ModelError(f"no name of a checkpoint leads to {parameter}; save the base model anew with transformers")

    def join(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters that the tensors of a group make; `tensors` by their names in the checkpoint."""
        rule = copy.deepcopy(group.converter)
        for before, stored in group.stored.items():
            rule.add_tensor(group.parameter, before, group.patterns[before], tensors[stored])
        return self._converted(rule, group.parameter)

    def part(self, group: Group, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a group, by their names in the checkpoint, that make these parameters.

        Raises:
            ModelError: transformers' rule cannot be turned round for them.
        """
        rule = group.converter.reverse_transform()
        first = ""
        for name, tensor in sorted(parameters.items(), key=lambda item: dot_natural_key(item[0])):
            renamed, pattern = apply_converters(name, [rule])
            first = first or renamed
            rule.add_tensor(renamed, name, pattern or name, tensor)
        parted = self._converted(rule, first)
        if set(parted) != set(group.stored):
            raise ModelError(
                f"{group.parameter}: transformers' rule for it does not lead back to the names of this checkpoint "
                f"({min(set(parted) ^ set(group.stored))}); save the base model anew with transformers"
            )
        return {group.stored[before]: tensor.contiguous() for before, tensor in parted.items()}

    def _converted(self, rule: Any, name: str) -> dict[str, torch.Tensor]:
        made = rule.convert(name, model=self._model, config=self._model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
