r"""`mmpeft adapters average` and `combine`: several adapters of one base as one.

The mean of products is not the product of means: mean(B) mean(A) is something else than mean(B A). What LoRA adds is
summed exactly by setting the matrices beside each other; the ranks add up:

    w1 s1 B1 A1 + w2 s2 B2 A2  =  [w1 s1 B1, w2 s2 B2] [A1; A2]

What is saved whole is averaged number by number.
"""

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from mmpeft.core.errors import AdapterError, RecipeError
from mmpeft.core.files import write_json, writing
from mmpeft.export.adapters.files import PREFIX, AdapterFiles, LoraModule, check_patterns, read_adapter
from mmpeft.export.artefact import artefact
from mmpeft.export.merge import BASE_LAYOUT
from mmpeft.methods.lora import NO_TARGETS
from mmpeft.models.load import BASE_REVISION

KIND = "adapter"

Tensors = dict[str, torch.Tensor]


def average_adapters(adapters: Sequence[str | Path], output: str | Path, *, weights: Sequence[float] = ()) -> Path:
    """Write the weighted mean of adapters of one base.

    Args:
        adapters: directories of two or more adapters; those that save modules whole have to save the same ones.
        output: a new or empty directory, or an earlier export, which is replaced.
        weights: one for each adapter, which are divided by their sum; default: all the same.

    Returns:
        `output`.

    Raises:
        AdapterError: they are of different bases, or of kinds whose mean is no adapter (DoRA, LoRA on experts).
        RecipeError: not one weight for each, or a sum of zero.
    """
    read = _read(adapters)
    given = list(weights) or [1.0] * len(read)
    if len(given) != len(read) or not sum(given):
        raise RecipeError(
            f"weights: found {given} for {len(read)} adapters; expected one for each, of a sum other than 0"
        )
    shares = [weight / sum(given) for weight in given]
    names = {name for adapter in read for name in adapter.whole}
    for adapter in read:
        lacking = sorted(names - set(adapter.whole))
        if lacking:
            raise AdapterError(
                f"{adapter.folder}: it does not hold {lacking[0]}, which another of the adapters saves whole; the mean "
                "with the base's is not known here: average adapters that train the same parts"
            )
    whole = {name: _mean([adapter.whole[name] for adapter in read], shares, name) for name in sorted(names)}
    lora, config = _sum(read, shares)
    return _write(output, read, {**lora, **whole}, config, {"averaged": dict(zip(_names(read), shares, strict=True))})


def combine_adapters(adapters: Sequence[str | Path], output: str | Path) -> Path:
    """Write one adapter that does what several do that were trained apart: a projector of one, LoRA of another.

    Where two have LoRA on one module, both are added.

    Args:
        adapters: directories of two or more adapters of one base.
        output: a new or empty directory, or an earlier export, which is replaced.

    Returns:
        `output`.

    Raises:
        AdapterError: they are of different bases, save one module each in its own way, or LoRA of kinds that cannot
            be added (DoRA, LoRA on experts) lies in more than one.
    """
    read = _read(adapters)
    whole: Tensors = {}
    owner: dict[str, Path] = {}
    for adapter in read:
        for name, tensor in adapter.whole.items():
            if name in whole and not torch.equal(whole[name], tensor):
                raise AdapterError(
                    f"{adapter.folder}: {name} differs from that of {owner[name]}, and one of them would be lost; "
                    "average them instead"
                )
            whole[name], owner[name] = tensor, adapter.folder
    with_lora = [adapter for adapter in read if adapter.lora]
    for adapter in read:
        for module in adapter.lora:
            if f"{module}.weight" in owner and owner[f"{module}.weight"] != adapter.folder:
                raise AdapterError(
                    f"{adapter.folder}: it has LoRA on {module}, which {owner[f'{module}.weight']} saves whole; "
                    "one adapter cannot do both"
                )
    if len(with_lora) == 1:
        # As it is, DoRA and all.
        lora = {f"{name}.{end}": tensor for name, module in with_lora[0].lora.items() for end, tensor in _ends(module)}
        config = dict(with_lora[0].config)
    else:
        lora, config = _sum(read, [1.0] * len(read))
    return _write(output, read, {**lora, **whole}, config, {"combined": _names(read)})


def _read(adapters: Sequence[str | Path]) -> list[AdapterFiles]:
    if len(adapters) < 2:
        raise RecipeError("adapters: found one; expected two or more")
    read = [read_adapter(folder) for folder in adapters]
    first = read[0]
    for other in read[1:]:
        if BASE_LAYOUT in first.facts and BASE_LAYOUT in other.facts:
            same = first.facts[BASE_LAYOUT] == other.facts[BASE_LAYOUT]
        else:
            same = first.config.get("base_model_name_or_path") == other.config.get("base_model_name_or_path")
        if not same:
            raise AdapterError(
                f"{other.folder}: trained on {other.config.get('base_model_name_or_path')}, but {first.folder} on "
                f"{first.config.get('base_model_name_or_path')}; only adapters of one base can become one"
            )
    return read


def _names(read: Sequence[AdapterFiles]) -> list[str]:
    return [str(adapter.folder) for adapter in read]


def _mean(tensors: Sequence[torch.Tensor], shares: Sequence[float], name: str) -> torch.Tensor:
    if len({tensor.shape for tensor in tensors}) > 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise AdapterError(f"{name} has the shapes {shapes}; only adapters of one base can become one")
    total = sum(share * tensor.double() for share, tensor in zip(shares, tensors, strict=True))
    return torch.as_tensor(total).to(tensors[0].dtype)


def _ends(module: LoraModule) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a LoRA by the ends of their names."""
    names = ("lora_A.weight", "lora_B.weight") if module.kind == "lora_" else ("lora_embedding_A", "lora_embedding_B")
    more = [(f"{end}.weight" if end == "lora_magnitude_vector" else end, tensor) for end, tensor in module.more.items()]
    return [*zip(names, (module.a, module.b), strict=True), *more]


def _sum(read: Sequence[AdapterFiles], shares: Sequence[float]) -> tuple[Tensors, dict[str, Any]]:
    """The LoRA that adds what all add, each by its share, and its configuration; its scale is 1 everywhere."""
    for adapter in read:
        _check_linear(adapter)
        check_patterns(adapter)
    tensors: Tensors = {}
    ranks: dict[str, int] = {}
    for module in sorted({name for adapter in read for name in adapter.lora}):
        parts = [
            (adapter.lora[module], share) for adapter, share in zip(read, shares, strict=True) if module in adapter.lora
        ]
        a = torch.cat([part.a.float() for part, _ in parts], 0)
        try:
            b = torch.cat([part.b.float() * part.scale * share for part, share in parts], 1)
        except RuntimeError as error:
            raise AdapterError(
                f"{module} has different sizes in the adapters ({error}); they are of other bases"
            ) from error
        ranks[module] = a.shape[0]
        bias = [part.more["lora_B.bias"].float() * part.scale * share for part, share in parts if part.more]
        more = {"lora_B.bias": torch.stack(bias).sum(0)} if bias else {}
        joined = LoraModule(a=a, b=b, scale=1.0, kind=parts[0][0].kind, more=more)
        tensors |= {f"{module}.{end}": tensor.contiguous() for end, tensor in _ends(joined)}
    return tensors, _joined_config(read, ranks)


def _check_linear(adapter: AdapterFiles) -> None:
    kinds = {
        "use_dora": "DoRA scales what it adds by the whole weight",
        "target_parameters": "LoRA on experts lies in blocks",
        "layer_replication": "layers are replicated",
    }
    for key, reason in kinds.items():
        if adapter.config.get(key):
            raise AdapterError(
                f"{adapter.folder}: {key} is set: {reason}, so that it cannot be added to another adapter; merge each "
                "into its base instead"
            )


def _joined_config(read: Sequence[AdapterFiles], ranks: Mapping[str, int]) -> dict[str, Any]:
    """That of the first, with ranks and scales of what was joined; the commonest rank needs no pattern."""
    config = dict(next((adapter for adapter in read if adapter.lora), read[0]).config)
    if not ranks:
        return config
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): found for module, found in ranks.items() if found != rank}
    targets = [adapter.config.get("target_modules") for adapter in read if adapter.lora]
    same = all(_as_set(target) == _as_set(targets[0]) for target in targets)
    return {
        **config,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "init_lora_weights": True,
        "lora_bias": any(adapter.config.get("lora_bias") for adapter in read),
        "target_modules": targets[0] if same else sorted(ranks),
    }


def _as_set(targets: Any) -> Any:
    return frozenset(targets) if isinstance(targets, list) else targets


def _write(
    output: str | Path,
    read: Sequence[AdapterFiles],
    tensors: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    facts: Mapping[str, Any],
) -> Path:
    saved = sorted({module for adapter in read for module in adapter.config.get("modules_to_save") or ()})
    config |= {"modules_to_save": saved or None, "inference_mode": True, **_agreed(read)}
    if not any(".lora_" in name for name in tensors):
        config["target_modules"] = NO_TARGETS
    kept = ("base_model", "family", BASE_LAYOUT, BASE_REVISION)
    about = {key: read[0].facts[key] for key in kept if key in read[0].facts}
    size = sum(tensor.nbytes for tensor in tensors.values())
    sources = [adapter.folder for adapter in read]
    with artefact(output, kind=KIND, needs=size, sources=sources, facts={**about, **facts}) as out:
        with writing(out.folder):
            named = {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(named, out.folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        write_json(out.folder / CONFIG_NAME, config)
        _copy_processor(read, out.folder)
    return Path(output)


def _agreed(read: Sequence[AdapterFiles]) -> dict[str, Any]:
    """Fields that say what some of the whole tensors are, by those adapters that set them."""
    agreed: dict[str, Any] = {}
    for key, default in (("bias", "none"), ("trainable_token_indices", None)):
        for adapter in read:
            value = adapter.config.get(key, default)
            if value != default and agreed.setdefault(key, value) != value:
                raise AdapterError(f"{adapter.folder}: {key} is {value!r}, of another adapter {agreed[key]!r}")
    return agreed


def _copy_processor(read: Sequence[AdapterFiles], folder: Path) -> None:
    """The files of the first adapter that has a processor beside it."""
    own = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "mmpeft.json", "README.md"}
    for adapter in read:
        if (adapter.folder / "processor_config.json").is_file() or (
            adapter.folder / "preprocessor_config.json"
        ).is_file():
            for file in adapter.folder.iterdir():
                if file.name not in own and file.suffix in (".json", ".jinja", ".txt", ".model"):
                    shutil.copyfile(file, folder / file.name)
            return
