"""Input hashes: what a stage depends on, so that it runs again when, and only when, one of these changed."""

import logging
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from mmpeft.config.recipe import ComposeConfig, Recipe, StageConfig
from mmpeft.core.hashing import hash_file, hash_value
from mmpeft.data.embedded import split_member
from mmpeft.data.mixture import MixedDataset
from mmpeft.data.roots import resolve_inside
from mmpeft.data.stream import StreamingDataset
from mmpeft.data.stream_mixture import StreamedMixture
from mmpeft.models.checkpoints import check_name, reading
from mmpeft.pipeline.data import TrainData
from mmpeft.pipeline.facts import versions

logger = logging.getLogger(__name__)

LARGE_FILE = 64 * 2**20
"""Bytes from which a file of a local model is known by size and time instead of its content."""


def model_identity(name: str) -> Any:
    """What stands for a model in a hash: contents of a local directory, or a hub id with its newest commit.

    Where the Hub cannot be reached, the newest commit is the cached one.

    Raises:
        ModelError: neither there nor in the cache.
    """
    path = Path(name)
    if path.is_file():
        return _file_identity(path)
    if path.is_dir():
        return {file.name: _file_identity(file) for file in sorted(path.iterdir()) if file.is_file()}
    check_name(name)
    with reading(name, "model"):
        config = cached_file(name, "config.json")
    return [name, Path(config).parent.name if config else None]


def _file_identity(path: Path) -> Any:
    stat = path.stat()
    return hash_file(path) if stat.st_size < LARGE_FILE else [stat.st_size, stat.st_mtime_ns]


def base_hash(recipe: Recipe) -> str:
    """Of the model that the first stage starts from."""
    if isinstance(recipe.model, ComposeConfig):
        sources = [recipe.model.vision] if isinstance(recipe.model.vision, str) else list(recipe.model.vision)
        identities = [model_identity(name) for name in (*sources, recipe.model.language)]
        return hash_value([recipe.model.model_dump(mode="json"), identities, recipe.seed])
    return hash_value(model_identity(recipe.model))


def data_hash(dataset: TrainData) -> str:
    """Of a data set: its file's content, size and time of each medium, and how much of it is decoded.

    Of a mixture: of each source, with its weight. Of a stream: the file's size and time, for it is not read twice;
    media are not looked at.
    """
    if isinstance(dataset, MixedDataset | StreamedMixture):
        return hash_value([[part.weight, data_hash(part.dataset)] for part in dataset.parts])
    varied = [dataset.augmentation.to_dict()] if dataset.augmentation is not None else []
    if isinstance(dataset, StreamingDataset):
        return hash_value([dataset.fingerprint, dataset.on_error, asdict(dataset.limits), *varied])
    media = {}
    for names in dataset.media_names():
        for name in chain.from_iterable(names):
            # What lies in a data: URL is part of the file's own content.
            if name not in media and not name.startswith("data:"):
                stat = file_of(name, dataset.media_root).stat()
                media[name] = [stat.st_size, stat.st_mtime_ns]
    return hash_value([dataset.fingerprint, media, len(dataset), asdict(dataset.limits), *varied])


def file_of(name: str, root: Path) -> Path:
    """The file that holds a medium: itself, or the container that it is a member of; neither is opened."""
    plain = root / name
    if plain.is_file():
        return plain
    parts = split_member(name)
    found = resolve_inside(parts[0] if parts else name, root=root, kind="medium")
    return found if isinstance(found, Path) else plain


def stage_hash(recipe: Recipe, stage: StageConfig, *, data: str, before: str) -> str:
    """Of a stage: `before` is the hash of the stage it follows, or of the base model."""
    return hash_value(
        {
            "before": before,
            "data": data,
            # The losses are the same however the processes share the work.
            "stage": stage.model_dump(mode="json", exclude={"distributed"}),
            "max_length": recipe.data.max_length,
            "max_pixels": recipe.data.max_pixels,
            "batch": recipe.batch.size,
            "share_media": recipe.batch.share_media,
            "balance": recipe.batch.balance,
            "seed": recipe.seed,
            "dtype": recipe.dtype,
            **_quantization(recipe),
            "versions": {name: version for name, version in versions().items() if name != "datasets"},
        }
    )


def evaluation_hash(recipe: Recipe, *, data: str, model: str) -> str:
    """Of one evaluation: `model` is the hash of the stage, or base model, that answers."""
    # Answers are the same with and without them.
    wanted = recipe.evaluate.model_dump(mode="json", exclude={"share_media", "share_weights"})
    return hash_value([wanted, recipe.data.max_pixels, data, model, *_quantization(recipe).values()])


def _quantization(recipe: Recipe) -> dict[str, str]:
    """In a hash only where there is one, so that what was made before there was the key stays valid."""
    return {} if recipe.quantization == "none" else {"quantization": recipe.quantization}
