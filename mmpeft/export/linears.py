"""Which linear layers of a model are quantized, and which stay as they are and why."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn
from transformers import PreTrainedModel

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import Part
from mmpeft.export.names import StoredNames
from mmpeft.families.registry import family_of, trained_model

PATTERN = "re:"
"""What a pattern of names begins with, as in compressed-tensors' lists."""


@dataclass(frozen=True, kw_only=True)
class Linears:
    """The linear layers of a model by their names in it.

    Attributes:
        chosen: those that are quantized, each with the name of its weight in the checkpoint.
        left: the others, each with the reason.
        language: names in the checkpoint of all weights of the language model.
        patterns: of modules that hold weights in other ways, for readers that would take them for linear layers.
    """

    chosen: Mapping[str, str]
    left: Mapping[str, str]
    language: frozenset[str]
    patterns: Sequence[str] = ()

    @property
    def ignore(self) -> list[str]:
        """What `quantization_config.ignore` lists."""
        return [*self.left, *self.patterns]


def choose_linears(
    model: PreTrainedModel, names: StoredNames, *, include: Sequence[str] = (), skip: Sequence[str] = ()
) -> Linears:
    """The language model's linear layers but its head, and those of other parts that are asked for.

    Args:
        model: with weights or without.
        names: of its checkpoint.
        include: parts to quantize beside the language model: `vision`, `audio`, `projector`.
        skip: names of layers that stay as they are, or `re:` and a pattern that is found in them.

    Raises:
        RecipeError: a part or a layer that does not exist, or nothing is left to quantize.
    """
    parts = get_args(Part)
    for asked in include:
        if asked not in parts:
            raise RecipeError(f"include: unknown part {asked!r}{did_you_mean(asked, parts)}; parts: {', '.join(parts)}")
    wanted = {"language", *include}
    inner, spec = trained_model(model), family_of(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is inner)
    head = inner.get_output_embeddings()
    stored = {parameter: name for name, parameter in names.parameters.items()}

    def part_of(name: str) -> Part | None:
        return spec.part_of(name.removeprefix(prefix)) if name.startswith(prefix) else None

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    skipped = matching(skip, linears)
    chosen: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, module in linears.items():
        part = part_of(name)
        if module is head:
            left[name] = "the head"
        elif part not in wanted:
            left[name] = part or "no part that is trained"
        elif name in skipped:
            left[name] = "skipped"
        elif f"{name}.weight" not in stored:
            left[name] = "its checkpoint stores it in another arrangement"
        else:
            chosen[name] = stored[f"{name}.weight"]
    if not chosen:
        raise RecipeError(f"skip: {', '.join(skip)}: no linear layer is left to quantize")
    experts = any(name.endswith("experts") and any(module.parameters()) for name, module in model.named_modules())
    language = frozenset(name for name, parameter in names.parameters.items() if part_of(parameter) == "language")
    return Linears(chosen=chosen, left=left, language=language, patterns=[f"{PATTERN}.*experts.*"] if experts else [])


def _names(pattern: str, name: str) -> bool:
    if pattern.startswith(PATTERN):
        return re.search(pattern.removeprefix(PATTERN), name) is not None
    return name == pattern


def matching(skip: Sequence[str], linears: Collection[str]) -> set[str]:
    """Those of `linears` that are skipped.

    Args:
        skip: names, or `re:` and a pattern that is found in them.

    Raises:
        RecipeError: one that names none of them.
    """
    skipped: set[str] = set()
    for pattern in skip:
        try:
            found = {name for name in linears if _names(pattern, name)}
        except re.error as error:
            raise RecipeError(f"skip: {pattern!r} is no regular expression ({error})") from error
        if not found:
            raise RecipeError(f"skip: no linear layer is called {pattern!r}{did_you_mean(pattern, linears)}")
        skipped |= found
    return skipped
