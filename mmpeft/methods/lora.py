"""From a `train` block to one `peft.LoraConfig`: which modules get LoRA, which are saved whole."""

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mmpeft.config.names import nearest
from mmpeft.config.train import changes_base
from mmpeft.core.errors import RecipeError
from mmpeft.core.types import PARTS, Part
from mmpeft.families.spec import FamilySpec
from mmpeft.methods.experts import keeps_pattern, parameter_names, rewritten_leaves

logger = logging.getLogger(__name__)

NO_TARGETS = "dummy-target-modules"
"""PEFT's own name for a LoRA that targets nothing, so that only `modules_to_save` train (peft >= 0.9)."""

_PER_PART = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)


def part_modules(model: nn.Module, spec: FamilySpec, part: Part) -> dict[str, nn.Module]:
    """Modules of a part that LoRA can wrap: linear layers, GPT-2's Conv1D, and embeddings left out."""
    return {
        name: module
        for name, module in model.named_modules()
        if spec.part_of(name) == part and isinstance(module, nn.Linear | Conv1D)
    }


def target_names(model: nn.Module, spec: FamilySpec, part: Part, fields: Mapping[str, Any]) -> list[str]:
    """Full names of the modules of one part that get LoRA.

    `target_modules` may be left out or "all-linear" (every linear layer of the part but the language-model
    head), a list of name endings, or a regular expression that the name inside the part has to match.
    `exclude_modules` takes some out again, `layers_to_transform` all but those of the layers it numbers.

    Raises:
        RecipeError: not one module matched; the message names those that exist.
    """
    modules = part_modules(model, spec, part)
    wanted = fields.get("target_modules", "all-linear")
    if wanted is None or wanted == "all-linear":
        chosen = _all_linear(model, part, modules)
    elif isinstance(wanted, str):
        chosen = [name for name in modules if _matches(wanted, _inside(name, spec, part))]
    else:
        chosen = [name for name in modules if any(name == w or name.endswith(f".{w}") for w in wanted)]
        _check_each_matched(part, wanted, chosen, modules)
    excluded = fields.get("exclude_modules")
    if excluded:
        _check_each_excluded(part, excluded, spec, modules)
        chosen = [name for name in chosen if not _excluded(name, excluded, spec, part)]
    if not chosen and not (wanted == [] and fields.get("target_parameters")):
        inside = f" such as {_inside(next(iter(modules)), spec, part)!r}" if modules else ""
        raise RecipeError(
            f"train.{part}: not one module matched target_modules={wanted!r}; "
            f"the {part} part has: {', '.join(_leaf_names(modules)) or 'no linear layer at all'}"
            f"{f' (a pattern has to match the whole name inside the part,{inside})' if isinstance(wanted, str) else ''}"
        )
    _check_not_rewritten(model, part, chosen)
    return _in_layers(chosen, part, fields, spec)


def _all_linear(model: nn.Module, part: Part, modules: Mapping[str, nn.Module]) -> list[str]:
    """Every linear layer of the part but heads, and but those that PEFT would take for experts."""
    heads, rewritten = _heads(model), rewritten_leaves(model, modules)
    if rewritten:
        logger.warning(
            "train.%s: LoRA leaves out the linear layers %s: for this model type peft would put it on all experts "
            "instead; to train those, name them in target_parameters",
            part,
            ", ".join(sorted(rewritten)),
        )
    return [
        name for name, module in modules.items() if module not in heads and name.rpartition(".")[2] not in rewritten
    ]


def _check_not_rewritten(model: nn.Module, part: Part, names: Iterable[str]) -> None:
    rewritten = rewritten_leaves(model, names)
    if rewritten:
        raise RecipeError(
            f"train.{part}.target_modules: for this model type peft takes {', '.join(sorted(rewritten))} as words for "
            "all experts, not for these linear layers; leave them out, and name experts in target_parameters"
        )


def _in_layers(names: list[str], part: Part, fields: Mapping[str, Any], spec: FamilySpec) -> list[str]:
    """Those of the layers that `layers_to_transform` numbers; `layers_pattern` names the lists of layers.

    An adapter names its modules by a pattern, and PEFT takes `layers_to_transform` beside lists only; so it is
    carried out here.
    """
    wanted, called = fields.get("layers_to_transform"), fields.get("layers_pattern")
    if wanted is None:
        if called is not None:
            raise RecipeError(f"train.{part}.layers_pattern: it needs layers_to_transform beside it")
        return names
    lists = "|".join(map(re.escape, [called] if isinstance(called, str) else called or ())) or r"[^.]+"
    found = {name: re.search(rf"(?:^|\.)(?:{lists})\.(\d+)\.", _inside(name, spec, part)) for name in names}
    layers = {name: int(match.group(1)) for name, match in found.items() if match}
    absent = sorted({wanted} - set(layers.values()) if isinstance(wanted, int) else set(wanted) - set(layers.values()))
    if absent:
        raise RecipeError(
            f"train.{part}.layers_to_transform: no chosen module lies in layer {absent[0]}; "
            f"there are layers {', '.join(map(str, sorted(set(layers.values())))) or 'of no number at all'}"
        )
    chosen = {wanted} if isinstance(wanted, int) else set(wanted)
    return [name for name in names if layers.get(name) in chosen]


def _heads(model: nn.Module) -> list[nn.Module]:
    """The language-model head, whatever its name (`lm_head`, `embed_out`): LoRA's defaults leave it alone."""
    inner = [module.get_output_embeddings() for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [head for head in inner if head is not None]


def _check_each_matched(part: Part, wanted: Iterable[str], chosen: list[str], modules: Iterable[str]) -> None:
    leaves = _leaf_names(modules)
    for want in wanted:
        if not any(name == want or name.endswith(f".{want}") for name in chosen):
            close = nearest(want, leaves)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RecipeError(
                f"train.{part}.target_modules: no module of the {part} part ends in {want!r}{hint} "
                f"(it has: {', '.join(leaves)})"
            )


def _check_each_excluded(
    part: Part, excluded: str | Iterable[str], spec: FamilySpec, modules: Mapping[str, nn.Module]
) -> None:
    for want in [excluded] if isinstance(excluded, str) else excluded:
        if not any(_excluded(name, want if isinstance(excluded, str) else [want], spec, part) for name in modules):
            leaves = _leaf_names(modules)
            close = nearest(want, leaves)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RecipeError(
                f"train.{part}.exclude_modules: {want!r} excludes no module of the {part} part{hint} "
                f"(it has: {', '.join(leaves)})"
            )


def _leaf_names(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise RecipeError(f"target_modules {pattern!r} is not a regular expression: {error}") from error


def _inside(name: str, spec: FamilySpec, part: Part) -> str:
    path = max((path for path in spec.parts[part] if name.startswith(path)), key=len)
    return name.removeprefix(path).removeprefix(".")


def _excluded(name: str, excluded: str | Iterable[str], spec: FamilySpec, part: Part) -> bool:
    if isinstance(excluded, str):
        return _matches(excluded, _inside(name, spec, part))
    return any(name == want or name.endswith(f".{want}") for want in excluded)


def names_to_regex(names: Iterable[str]) -> str:
    r"""A regular expression that matches exactly `names`, with layer numbers and common ends folded.

        m.layers.0.q, m.layers.1.q, m.layers.0.v, m.layers.1.v  ->  m\.layers\.(0|1)\.(q|v)

    A pattern, not a list: PEFT matches list entries as endings, which would reach other towers too.
    """
    by_shape: dict[tuple[str, str], set[str]] = {}
    for name in names:
        stem, _, leaf = name.rpartition(".")
        number = re.search(r"\.(\d+)\.", stem + ".")
        if number:
            before, after = stem[: number.start() + 1], (stem + ".")[number.end() - 1 :].removesuffix(".")
            key = (f"{re.escape(before)}%{re.escape(after)}", leaf)
            by_shape.setdefault(key, set()).add(number.group(1))
        else:
            by_shape.setdefault((re.escape(stem), leaf), set())
    by_numbers: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (shape, leaf), numbers in by_shape.items():
        by_numbers.setdefault((shape, tuple(sorted(numbers, key=int))), []).append(leaf)
    return "|".join(
        (shape.replace("%", f"({'|'.join(numbers)})") if numbers else shape)
        + (r"\." if shape else "")
        + (re.escape(leaves[0]) if len(leaves) == 1 else f"({'|'.join(map(re.escape, sorted(leaves)))})")
        for (shape, numbers), leaves in by_numbers.items()
    )


def lora_config(model: nn.Module, spec: FamilySpec, train: Mapping[Part, Any], *, saved: list[str]) -> LoraConfig:
    """One `LoraConfig` for all parts that have LoRA, with `saved` as leaf-level `modules_to_save`.

    Parts with another `r` or `lora_alpha` than the first are written as `rank_pattern` / `alpha_pattern`;
    every other field has to agree, since an adapter has one configuration.

    Raises:
        RecipeError: a part's fields contradict another's, or match no module.
    """
    parts = {part: train[part] for part in PARTS if isinstance(train.get(part), Mapping)}
    if not parts:
        return LoraConfig(target_modules=NO_TARGETS, modules_to_save=saved)
    shared = _shared_fields(parts)
    names = {part: target_names(model, spec, part, fields) for part, fields in parts.items()}
    experts = {part: _experts(model, spec, part, fields) for part, fields in parts.items()}
    for part, fields in parts.items():
        _check_decomposable(model, part, fields, names[part])
    first = next(iter(parts.values()))
    rank, alpha = first.get("r", 8), first.get("lora_alpha", 8)
    ranks, alphas = {}, {}
    for part, fields in list(parts.items())[1:]:
        pattern = names_to_regex([*names[part], *experts[part]])
        if fields.get("r", 8) != rank:
            ranks[pattern] = fields.get("r", 8)
        if fields.get("lora_alpha", 8) != alpha:
            alphas[pattern] = fields.get("lora_alpha", 8)
    try:
        return LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=target_modules(model, [name for part in parts for name in names[part]]),
            target_parameters=[name for part in parts for name in experts[part]] or None,
            modules_to_save=saved or None,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            **shared,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"train.{next(iter(parts))}: peft.LoraConfig refuses these fields: {error}") from error


def _experts(model: nn.Module, spec: FamilySpec, part: Part, fields: Mapping[str, Any]) -> list[str]:
    names = parameter_names(model, spec, part, fields)
    return _in_layers(names, part, fields, spec) if names else names


def target_modules(model: nn.Module, names: list[str]) -> str | list[str]:
    """What `peft.LoraConfig` takes for these modules: a pattern where PEFT keeps one, else the names one by one."""
    if not names:
        return NO_TARGETS
    pattern = names_to_regex(names)
    return pattern if keeps_pattern(model, pattern) else names


def _check_decomposable(model: nn.Module, part: Part, fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """PiSSA and OLoRA take no more directions than a matrix has; PEFT would write an adapter that it cannot read."""
    if not changes_base(fields):
        return
    sides = {name: min(cast(torch.Tensor, model.get_submodule(name).weight).shape) for name in names}
    smallest, most = min(sides.items(), key=lambda pair: pair[1])
    if fields.get("r", 8) > most:
        raise RecipeError(
            f"train.{part}.r: {fields.get('r', 8)} is above {most}, the smaller side of {smallest}; "
            f"init_lora_weights={fields['init_lora_weights']!r} needs r of at most {most}"
        )


def _shared_fields(parts: Mapping[Part, Mapping[str, Any]]) -> dict[str, Any]:
    shared: dict[str, Any] = {}
    owner: dict[str, Part] = {}
    first = next(iter(parts))
    for part, fields in parts.items():
        for key in (key for key in fields if key not in _PER_PART):
            if part != first and key not in shared:
                raise RecipeError(f"train.{part}.{key}: an adapter has one {key}; train.{first} has to give the same")
            if key in shared and shared[key] != fields[key]:
                raise RecipeError(
                    f"train.{part}.{key}: {fields[key]!r} differs from {shared[key]!r} of train.{owner[key]}; "
                    "an adapter has one value for both"
                )
            shared[key], owner[key] = fields[key], part
        for key in shared:
            if key not in fields:
                raise RecipeError(f"train.{part}: give {key} = {shared[key]!r} here too, as train.{owner[key]} has it")
    return shared
