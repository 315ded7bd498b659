"""`mmpeft adapters convert`: what other programs trained as a plain PEFT adapter on a base that transformers loads.

Each tensor has to find its place in the base, by name and by shape; what does not is named, and nothing is written.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from mmpeft.core.errors import AdapterError
from mmpeft.export.adapters.files import LoraModule, check_finite, take_apart
from mmpeft.export.adapters.foreign import Foreign, candidates, read_foreign
from mmpeft.export.artefact import artefact
from mmpeft.export.merge import BASE_LAYOUT
from mmpeft.export.names import StoredNames
from mmpeft.export.shards import Checkpoint
from mmpeft.export.sources import fetch_model
from mmpeft.families.registry import family_of, trained_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.methods.lora import target_modules
from mmpeft.models.load import attach_adapter, load_processor
from mmpeft.models.weightless import read_config, weightless_model

KIND = "adapter"

_SHOWN = 5
"""Names in a message before it says how many more there are."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted.

    Attributes:
        output: directory of the adapter.
        files: what was read.
        lora: number of modules with LoRA.
        saved: names of the modules that are saved whole.
    """

    output: Path
    files: tuple[Path, ...]
    lora: int
    saved: tuple[str, ...]


def convert_adapter(
    source: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    lora_alpha: float | None = None,
    trust_remote_code: bool = False,
) -> Conversion:
    """Write a plain PEFT adapter from what LLaVA, ms-swift, MindSpeed-MM or PEFT itself wrote.

    Args:
        source: a file (`mm_projector.bin`, `non_lora_trainables.bin`, `vit.safetensors`, `lora_adapter*.safetensors`,
            `adapter_model.*`), or a directory of such files, which become one adapter together.
        output: a new or empty directory, or an earlier export, which is replaced.
        base: directory or hub id of the model in transformers' own layout that the adapter is for.
        lora_alpha: of a LoRA that comes without an adapter_config.json.
        trust_remote_code: whether code that comes with the base may run.

    Raises:
        AdapterError: a tensor has no place in the base or another shape there, the scale of LoRA is not known, a weight
            is NaN or infinite, or a pickle could run code.
    """
    foreign = read_foreign(source)
    check_finite(foreign.tensors, Path(source))
    folder = fetch_model(str(base))
    config = read_config(folder, trust_remote_code=trust_remote_code)
    model = weightless_model(config, str(base), trust_remote_code=trust_remote_code)
    fitted = _fit(foreign, model, Path(source), lora_alpha=lora_alpha)
    checkpoint = Checkpoint(folder)
    saved, whole = _modules(model, fitted.whole, checkpoint)
    with artefact(output, kind=KIND, sources=[folder, *foreign.files], facts={}) as out:
        adapted = _attached(model, fitted, saved, whole)
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        processor = load_processor(folder, trust_remote_code=trust_remote_code)
        save_adapter(adapted, out.folder, processor=processor)
        again = weightless_model(config, str(base), trust_remote_code=trust_remote_code)
        attach_adapter(again, out.folder, weightless=True)
        out.facts |= {
            "base_model": str(base),
            "family": family_of(again).name,
            "converted": [file.name for file in foreign.files],
            BASE_LAYOUT: checkpoint.layout_hash(),
        }
    return Conversion(output=Path(output), files=foreign.files, lora=len(fitted.lora), saved=tuple(saved))


@dataclass(frozen=True, kw_only=True)
class _Fitted:
    """Foreign tensors by the names of the base's modules and parameters."""

    lora: dict[str, LoraModule]
    whole: dict[str, torch.Tensor]
    rslora: bool
    dora: bool


def _fit(foreign: Foreign, model: PreTrainedModel, source: Path, *, lora_alpha: float | None) -> _Fitted:
    names = StoredNames(model, ())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    leaves = _projector_leaves(model)
    settings = _settings(foreign, source, lora_alpha)
    lora, whole = take_apart(foreign.tensors, settings, source)
    homeless, misshapen = [], []
    found_lora: dict[str, LoraModule] = {}
    found_whole: dict[str, torch.Tensor] = {}

    def place(name: str) -> str | None:
        options = [parameter for option in candidates(name, leaves) if (parameter := names.parameter_of(option))]
        return options[0] if options else None

    for module, part in lora.items():
        parameter = place(f"{module}.weight")
        outputs, inputs = part.b.shape[0], tuple(part.a.shape[1:])
        if parameter is None:
            homeless.append(module)
        elif not _fits(shapes[parameter], outputs, inputs, part):
            misshapen.append(f"{module} ({outputs} x {inputs[0]}, {parameter} is {shapes[parameter]})")
        else:
            found_lora[parameter.removesuffix(".weight")] = part
    for name, tensor in whole.items():
        parameter = place(name)
        if parameter is None:
            homeless.append(name)
        elif shapes[parameter] != tuple(tensor.shape):
            misshapen.append(f"{name} ({tuple(tensor.shape)}, {parameter} is {shapes[parameter]})")
        else:
            found_whole[parameter] = tensor
    _refuse(source, homeless, misshapen, model)
    if len(found_lora) + len(found_whole) < len(lora) + len(whole):
        raise AdapterError(f"{source}: two of its tensors would go to one place; give one file of them")
    dora = any("lora_magnitude_vector" in part.more for part in lora.values())
    return _Fitted(lora=found_lora, whole=found_whole, rslora=bool(settings.get("use_rslora")), dora=dora)


def _fits(shape: tuple[int, ...], outputs: int, inputs: tuple[int, ...], part: LoraModule) -> bool:
    if part.kind == "lora_embedding_":
        return shape == (inputs[0], outputs)
    # GPT-2's Conv1D lies the other way round.
    return shape in ((outputs, *inputs), (*inputs, outputs))


def _refuse(source: Path, homeless: list[str], misshapen: list[str], model: PreTrainedModel) -> None:
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for what, names in (("have no place in it", homeless), ("have another shape", misshapen))
        if names
    ]
    if problems:
        raise AdapterError(
            f"{source}: it does not fit {type(model).__name__}; of its tensors {'; '.join(problems)}. Nothing was "
            "written; give the base that they were trained on, in the layout of transformers"
        )


def _settings(foreign: Foreign, source: Path, lora_alpha: float | None) -> dict[str, Any]:
    """The fields that say how LoRA is scaled."""
    if foreign.config is not None:
        return dict(foreign.config)
    if lora_alpha is None and any(".lora_" in name for name in foreign.tensors):
        raise AdapterError(
            f"{source}: no adapter_config.json beside it, so the scale of its LoRA is not known; give the lora_alpha "
            "that it was trained with (--lora-alpha)"
        )
    return {"lora_alpha": lora_alpha or 1}


def _projector_leaves(model: PreTrainedModel) -> dict[int, str]:
    """The projector's linear layers by their numbers in LLaVA's `nn.Sequential`: linear, activation, linear, ..."""
    inner = trained_model(model)
    spec = family_of(inner)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is inner)
    linear = [
        leaf for leaf in spec.projector_leaves(inner, spec) if isinstance(inner.get_submodule(leaf), torch.nn.Linear)
    ]
    return {2 * index: prefix + leaf for index, leaf in enumerate(linear)}


def _modules(
    model: PreTrainedModel, whole: Mapping[str, torch.Tensor], checkpoint: Checkpoint
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Modules that hold the parameters of `whole`, and all parameters of these; what is lacking comes from the base.

    A module that has parameters of its own and modules with parameters below it is saved with all below it, for PEFT
    cannot save one without the other.
    """
    owners = {name.rpartition(".")[0] for name in whole}
    outer = sorted(name for name in owners if not any(name.startswith(f"{other}.") for other in owners))
    inside = [name for name in model.state_dict() if any(name.startswith(f"{module}.") for module in outer)]
    lacking = set(inside) - set(whole)
    if not lacking:
        return outer, dict(whole)
    stored = {parameter: name for name, parameter in StoredNames(model, checkpoint.tensors).parameters.items()}
    unknown = sorted(lacking - set(stored))
    if unknown:
        raise AdapterError(f"{checkpoint.folder}: it does not store {unknown[0]}, which is saved with what was trained")
    return outer, {**whole, **{name: checkpoint.read(stored[name]) for name in sorted(lacking)}}


def _attached(model: PreTrainedModel, fitted: _Fitted, saved: list[str], whole: Mapping[str, torch.Tensor]) -> Any:
    """A PEFT model on the weightless base, with the tensors in it."""
    inner = trained_model(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is inner)
    foreign_parts = sorted(name for name in {*fitted.lora, *whole} if not name.startswith(prefix))
    if foreign_parts:
        raise AdapterError(f"{foreign_parts[0]} lies outside {type(inner).__name__}, the part that adapters are for")
    lora = {name.removeprefix(prefix): part for name, part in fitted.lora.items()}
    ranks = {name: part.rank for name, part in lora.items()}
    alphas = {name: part.scale * (math.sqrt(part.rank) if fitted.rslora else part.rank) for name, part in lora.items()}
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8)
    config = LoraConfig(
        r=int(rank),
        lora_alpha=_whole_number(alpha),
        rank_pattern={re.escape(name): found for name, found in ranks.items() if found != rank},
        alpha_pattern={re.escape(name): _whole_number(found) for name, found in alphas.items() if found != alpha},
        target_modules=target_modules(inner, sorted(lora)),
        modules_to_save=[name.removeprefix(prefix) for name in saved] or None,
        use_rslora=fitted.rslora,
        use_dora=fitted.dora,
        lora_bias=any("lora_B.bias" in part.more for part in lora.values()),
    )
    adapted = peft.get_peft_model(inner, config, low_cpu_mem_usage=True)
    state = {f"base_model.model.{name.removeprefix(prefix)}": tensor for name, tensor in whole.items()}
    placed = {_inside(name, saved, prefix): tensor for name, tensor in state.items()}
    for name, part in lora.items():
        place = f"base_model.model.{name}."
        ends = {f"{part.kind}A": part.a, f"{part.kind}B": part.b}
        weight = "" if part.kind == "lora_embedding_" else ".weight"
        placed |= {f"{place}{end}.default{weight}": tensor for end, tensor in ends.items()}
        if "lora_magnitude_vector" in part.more:
            placed[f"{place}lora_magnitude_vector.default.weight"] = part.more["lora_magnitude_vector"]
        if "lora_B.bias" in part.more:
            placed[f"{place}lora_B.default.bias"] = part.more["lora_B.bias"]
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in placed.items()}
    left = adapted.load_state_dict(floats, strict=False, assign=True).unexpected_keys
    if left:
        raise AdapterError(f"peft has no place for {left[0]}")
    return adapted


def _inside(name: str, saved: list[str], prefix: str) -> str:
    """The name of a parameter inside PEFT's copy of the module that is saved whole."""
    for module in saved:
        place = f"base_model.model.{module.removeprefix(prefix)}."
        if name.startswith(place):
            return f"{place}modules_to_save.default.{name.removeprefix(place)}"
    return name


def _commonest(values: Any, default: float) -> float:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else default


def _whole_number(value: float) -> Any:
    """An alpha as people write it: 16, not 16.000000000000004. PEFT says that it is an int, and takes others too."""
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
