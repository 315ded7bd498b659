"""`mmpeft adapters list`: the adapters under a folder, by what their files say of them; no tensor is read."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.export.adapters.files import PREFIX, read_config
from mmpeft.export.shards import read_header
from mmpeft.models.load import read_facts

_DEPTH = 6
"""Folders below the given one that are looked into."""


@dataclass(frozen=True, kw_only=True)
class AdapterEntry:
    """One adapter.

    Attributes:
        path: its directory.
        base: the model that it names.
        kind: `LoRA`, `DoRA`, `rsLoRA`, `projector` (saved whole, by modules), or two of these.
        rank: the largest rank of its LoRA; None where it has none.
        modules: number of modules with LoRA.
        saved: names of the modules that are saved whole.
        parameters: number of its weights.
        bytes: of its file of weights.
        stages: names of the stages that trained it, as mmpeft.json records.
        metrics: its scores by mmpeft.json, after training.
        problem: why it cannot be used; None where nothing speaks against it.
    """

    path: Path
    base: str | None = None
    kind: str = ""
    rank: int | None = None
    modules: int = 0
    saved: tuple[str, ...] = ()
    parameters: int = 0
    bytes: int = 0
    stages: tuple[str, ...] = ()
    metrics: dict[str, float] | None = None
    problem: str | None = None


def list_adapters(folder: str | Path) -> list[AdapterEntry]:
    """All adapters in a folder and the folders below it, by path. Ready configurations without weights are left out.

    Raises:
        AdapterError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder")
    found = []
    for place, below, files in os.walk(folder):
        path = Path(place)
        deep = len(path.relative_to(folder).parts) >= _DEPTH
        below[:] = [] if deep else sorted(name for name in below if not name.startswith("."))
        if CONFIG_NAME in files and any(name.startswith("adapter_model") for name in files):
            found.append(_entry(path))
    return found


def _entry(path: Path) -> AdapterEntry:
    try:
        config, facts = read_config(path), read_facts(path)
        weights = path / SAFETENSORS_WEIGHTS_NAME
        if not weights.is_file():
            raise AdapterError(f"{path}: its weights are pickled; convert them by `mmpeft adapters convert`")
        tensors = read_header(weights)
    except (AdapterError, ModelError) as error:
        return AdapterEntry(path=path, problem=str(error))
    lora = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors if ".lora_" in name}
    whole = {name.removeprefix(PREFIX).rpartition(".")[0] for name in tensors if ".lora_" not in name}
    ranks = [stored.shape[0] for name, stored in tensors.items() if name.endswith((".lora_A.weight", "embedding_A"))]
    after = (facts.get("metrics") or {}).get("after")
    return AdapterEntry(
        path=path,
        base=config.get("base_model_name_or_path"),
        kind=_kind(config, lora=bool(lora), whole=bool(whole)),
        rank=max(ranks, default=None) if not config.get("target_parameters") else config.get("r"),
        modules=len(lora),
        saved=tuple(sorted(whole)),
        parameters=sum(math.prod(stored.shape) for stored in tensors.values()),
        bytes=weights.stat().st_size,
        stages=tuple(map(str, facts.get("stages") or ())),
        metrics=after if isinstance(after, dict) else None,
    )


def _kind(config: dict[str, Any], *, lora: bool, whole: bool) -> str:
    name = "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    return " + ".join([*(["projector"] if whole else []), *([name] if lora else [])])
