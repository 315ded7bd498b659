"""A recipe's data: loaded, checked against its stages, and described for the run's records."""

import logging
from collections.abc import Sequence
from typing import Any

from mmpeft.config.data import SourceConfig
from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError
from mmpeft.core.hashing import hash_value
from mmpeft.data.dataset import MultimodalDataset, load_dataset, load_file, load_stream
from mmpeft.data.formats import source_root
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.mixture import MixedDataset, Source
from mmpeft.data.stream import StreamingDataset
from mmpeft.data.stream_mixture import Stream, StreamedMixture

TrainData = MultimodalDataset | MixedDataset | Stream

Mixture = MixedDataset | StreamedMixture

logger = logging.getLogger(__name__)


def load_train(recipe: Recipe, processor: Any) -> TrainData:
    """What the stages train on: the data set of one file, a mixture of several, or a stream.

    Raises:
        DataError: see `load_dataset`.
    """
    sources = [Source(**source.model_dump()) for source in recipe.data.sources]
    dataset: TrainData
    options = _options(recipe, processor)
    alone = sources[0] if recipe.data.alone else None
    if recipe.data.streaming:
        options |= {"shuffle_buffer": recipe.data.shuffle_buffer, "seed": recipe.seed}
        dataset = load_stream(alone, **options) if alone else load_dataset(sources, streaming=True, **options)
    elif alone:
        dataset = load_file(alone, **options)
    else:
        dataset = load_dataset(sources, seed=recipe.seed, **options)
    dataset.augment_with(recipe.data.augment, seed=recipe.seed)
    return dataset


def load_held_out(recipe: Recipe, processor: Any) -> MultimodalDataset | None:
    """What is asked before and after; None where the recipe has no `data.eval`.

    Raises:
        DataError: see `load_dataset`.
    """
    sources = _held_out(recipe)
    return load_file(Source(**sources[0].model_dump()), **_options(recipe, processor)) if sources else None


def _held_out(recipe: Recipe) -> tuple[SourceConfig, ...]:
    source = recipe.data.eval
    if source is None:
        return ()
    return (source if isinstance(source, SourceConfig) else SourceConfig(path=source),)


def _options(recipe: Recipe, processor: Any) -> dict[str, Any]:
    data = recipe.data
    return {
        "media_root": data.media_root,
        "processor": processor,
        "max_length": data.max_length,
        "limits": MediaLimits(**data.media.model_dump()),
        "on_error": data.on_error,
        "max_skipped": data.max_skipped,
    }


def check_media(recipe: Recipe, dataset: TrainData) -> None:
    """Refuse a stage that trains only what carries media on data without any: it would learn nothing.

    Raises:
        RecipeError: names stage, parts and files.
    """
    if isinstance(dataset, Stream):
        # The rest of the files is not known.
        heads = [row for stream in parts_of(dataset) for row in stream.head]
        if not any(any(row.sample.media.values()) for row in heads if row.sample is not None):
            logger.warning("%s: none of its first %d samples has a picture", dataset.path, len(heads))
        return
    files = parts_of(dataset)
    if any(any(file.sample(index).media.values()) for file in files for index in range(len(file))):
        return
    for stage in recipe.stages:
        if stage.train.get("language", "frozen") == "frozen":
            parts = " and ".join(part for part, training in stage.train.items() if training != "frozen")
            raise RecipeError(
                f"stages.{stage.name}: it trains only {parts}, but no sample of "
                f"{', '.join(str(file.path) for file in files)} has a picture; "
                "train the language part, or give samples an `image`"
            )


def parts_of(dataset: TrainData) -> list[Any]:
    """The data sets that a mixture is made of; any other by itself."""
    return [part.dataset for part in dataset.parts] if isinstance(dataset, Mixture) else [dataset]


def one_of_each_media(dataset: Any) -> list[int]:
    """The first sample of each that are on the same media, of a data set with `media_key`; none without media."""
    first: dict[int, int] = {}
    for index in range(len(dataset)):
        if key := dataset.media_key(index):
            first.setdefault(key, index)
    return list(first.values())


def count_samples(dataset: TrainData) -> int | None:
    """Samples of an epoch; None where they are not known before they have been read."""
    if isinstance(dataset, StreamedMixture):
        return dataset.samples
    return None if isinstance(dataset, StreamingDataset) else len(dataset)


def describe_data(recipe: Recipe, train: TrainData, held_out: MultimodalDataset | None) -> dict[str, Any]:
    """What data.json says: of a mixture the whole, and each source.

    {"train": {"file": "a.json, b.json", "samples": 30, …,
               "sources": [{"name": "a", "weight": 2.0, "shown": 20, "file": "a.json", "samples": 10, …}, …]},
     "eval": {"file": "c.json", "samples": 5, …}}
    """
    described = [_describe_file(recipe, held_out, source) for source in _held_out(recipe) if held_out is not None]
    return {"train": _describe_train(recipe, train), "eval": described[0] if described else None}


def _describe_train(recipe: Recipe, dataset: TrainData) -> dict[str, Any]:
    if not isinstance(dataset, Mixture):
        return _describe_file(recipe, dataset, recipe.data.sources[0])
    parts: Sequence[Any] = dataset.parts
    sources = [
        {
            "name": part.name,
            "weight": part.weight,
            "samples": part.samples,
            "shown": part.count,
            **_describe_file(recipe, part.dataset, source),
        }
        for part, source in zip(parts, recipe.data.sources, strict=True)
    ]
    whole = {
        "file": ", ".join(source["file"] for source in sources),
        "samples": count_samples(dataset),
        "fingerprint": hash_value([[source["fingerprint"], source["weight"]] for source in sources]),
        "sources": sources,
    }
    if isinstance(dataset, StreamedMixture):
        return {**whole, "streaming": True}
    return {
        **whole,
        "truncated": dataset.truncated,
        "skipped": [vars(skipped) for skipped in dataset.skipped],
    }


def _describe_file(
    recipe: Recipe, dataset: MultimodalDataset | StreamingDataset, source: SourceConfig
) -> dict[str, Any]:
    """Paths are as the recipe has them, since adapters are published with this."""
    place = {
        "file": str(dataset.path),
        "media_root": str(source.media_root or recipe.data.media_root or source_root(source.path)),
    }
    if isinstance(dataset, StreamingDataset):
        return {**place, "streaming": True, "fingerprint": dataset.fingerprint}
    return {
        **place,
        "samples": len(dataset),
        **({"boxes": dataset.boxes} if dataset.boxes else {}),
        "truncated": dataset.truncated,
        "fingerprint": dataset.fingerprint,
        "skipped": [vars(skipped) for skipped in dataset.skipped],
    }


def describe_sources(dataset: TrainData) -> list[dict[str, Any]]:
    """The sources of a mixture for plan.json: name, weight, samples, and how many of them an epoch shows."""
    if not isinstance(dataset, Mixture):
        return []
    return [
        {"name": part.name, "weight": part.weight, "samples": part.samples, "shown": part.count}
        for part in dataset.parts
    ]
