"""What a run came from, by content: base models, media and machine; to tell later whether these are still the same."""

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download

from mmpeft.config.recipe import ComposeConfig, Recipe
from mmpeft.core.hashing import hash_file, hash_value
from mmpeft.data.mixture import MixedDataset
from mmpeft.data.stream import StreamingDataset
from mmpeft.data.stream_mixture import StreamedMixture
from mmpeft.export.hub import MANIFEST
from mmpeft.models.checkpoints import reading
from mmpeft.models.load import FACTS_NAME
from mmpeft.pipeline.data import TrainData
from mmpeft.pipeline.facts import hardware
from mmpeft.pipeline.inputs import file_of, model_identity

HASHED = 2**30
"""Bytes of media up to which all of them are read, once a run."""

Origin = Mapping[str, Any]
"""`{"role", "name"}`, and of a directory `files` (SHA-256 of each), of a file `sha256`, of a hub id `commit`."""


def base_origins(recipe: Recipe, like: Mapping[str, Origin] | None = None) -> list[Origin]:
    """What the base model is made of: one entry, or of a composed one an entry for each part.

    Args:
        like: earlier entries by role; a hub id whose entry has `files` is fetched and hashed, to be compared with it.

    Raises:
        ModelError: a model is not there.
    """
    return [_origin(role, name, (like or {}).get(role, {})) for role, name in _names(recipe)]


def _names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if not isinstance(recipe.model, ComposeConfig):
        yield "model", recipe.model
        return
    vision = recipe.model.vision
    if isinstance(vision, str):
        yield "vision", vision
    else:
        yield from ((f"vision {at}", name) for at, name in enumerate(vision, 1))
    yield "language", recipe.model.language


def _origin(role: str, name: str, like: Origin) -> Origin:
    path = Path(name)
    if path.is_file():
        return {"role": role, "name": name, "sha256": hash_file(path)}
    if path.is_dir():
        return {"role": role, "name": name, "files": _hashes(path), **_downloaded(path)}
    _, commit = model_identity(name)
    if "files" not in like:
        return {"role": role, "name": name, "commit": commit}
    with reading(name, "model"):
        folder = snapshot_download(name, revision=commit, allow_patterns=list(like["files"]))
    return {"role": role, "name": name, "files": _hashes(Path(folder))}


def _downloaded(folder: Path) -> dict[str, str]:
    """The commit that a directory was filled from by `hf download --local-dir`, which notes it beside each file."""
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return {"commit": note.read_text(encoding="utf-8").splitlines()[0].strip()} if note.is_file() else {}


def _hashes(folder: Path) -> dict[str, str]:
    """Of what a model computes with: weights and configuration, not of cards and the like."""
    kept = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py")
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in kept)
    return {file.name: hash_file(file) for file in files if file.name not in (FACTS_NAME, MANIFEST)}


def media_fingerprint(dataset: TrainData | None) -> str | None:
    """Hash of all media of a data set, by content up to `HASHED`, else by name and size; None of a stream.

    "content:<sha256>" or "sizes:<sha256>"
    """
    if dataset is None or isinstance(dataset, StreamingDataset | StreamedMixture):
        return None
    if isinstance(dataset, MixedDataset):
        return hash_value([media_fingerprint(part.dataset) for part in dataset.parts])
    names = {
        name for each in dataset.media_names() for name in chain.from_iterable(each) if not name.startswith("data:")
    }
    files = {name: file_of(name, dataset.media_root) for name in sorted(names)}
    sizes = {file: file.stat().st_size for file in files.values()}
    if sum(sizes.values()) > HASHED:
        return f"sizes:{hash_value([[name, sizes[file]] for name, file in files.items()])}"
    hashes = {file: hash_file(file) for file in sizes}
    return f"content:{hash_value([[name, hashes[file]] for name, file in files.items()])}"


def machine(state: PartialState) -> dict[str, Any]:
    """The kind of machine, as far as bits depend on it: device, hardware, processes, and threads on a CPU."""
    return {
        "device": state.device.type,
        "hardware": hardware(state.device),
        "processes": state.num_processes,
        "threads": torch.get_num_threads(),
    }
