"""A recipe's feature cache, filled before training: what frozen towers make of each sample's media."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.core.errors import OutputError, RecipeError
from mmpeft.data.feature_store import Entry
from mmpeft.data.stream_mixture import Stream
from mmpeft.models.devices import pick_device
from mmpeft.models.load import load_processor
from mmpeft.pipeline.arguments import count_steps, data_processes, plan_batch
from mmpeft.pipeline.base import resolve_base
from mmpeft.pipeline.cutting import measure
from mmpeft.pipeline.data import TrainData, load_train, one_of_each_media, parts_of
from mmpeft.pipeline.directory import RunDirectory
from mmpeft.pipeline.features import keep_features
from mmpeft.pipeline.inputs import base_hash
from mmpeft.pipeline.stage import StageStart, make_trainer, prepare_stage
from mmpeft.training.features import FeatureCache
from mmpeft.training.trainer import MultimodalTrainer

Progress = Callable[[int, int], None]
"""Called with how many samples with unlike media are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What filling a cache came to, in this process.

    Attributes:
        directory: where the features are.
        stage: the stage whose towers made them; all stages of the recipe with frozen towers share them.
        media: samples with unlike media.
        present: of those, kept before.
        written: of those, kept now.
        refused: of those, left out, because `data.cache.limit_bytes` is reached.
        bytes: of the features of this recipe that are kept.
        seconds: of all.
    """

    directory: Path
    stage: str
    media: int
    present: int
    written: int
    refused: int
    bytes: int
    seconds: float


def fill_cache(recipe: Recipe, *, stage: str | None = None, on_progress: Progress | None = None) -> Filled:
    """Keep what a recipe's frozen towers make of its training media; what is kept already is not made again.

    Of several processes each takes its share.

    Args:
        stage: the stage whose towers are run; default: the first.

    Raises:
        RecipeError: no such stage, or its features cannot be kept; says why.
        OutputError: the cache cannot be written.
        DataError, ModelError: as a run would raise them.
    """
    begin = time.perf_counter()
    PartialState(cpu=pick_device(recipe.device).type == "cpu")
    index, chosen = _stage(recipe, stage)
    trainer, dataset = _prepared(recipe, index, chosen)
    asked = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(
                update={"cache": recipe.data.cache.model_copy(update={"features": True})},
            )
        }
    )
    why = keep_features(asked, chosen, trainer, dataset)
    if trainer.features is None:
        raise RecipeError(f"stages.{chosen.name}: its features cannot be kept: {why}")
    counts = _fill(trainer, trainer.features, dataset, on_progress)
    return Filled(
        directory=trainer.features.store.directory, stage=chosen.name, seconds=time.perf_counter() - begin, **counts
    )


def _stage(recipe: Recipe, name: str | None) -> tuple[int, StageConfig]:
    names = [stage.name for stage in recipe.stages]
    if name is not None and name not in names:
        raise RecipeError(f"no stage {name!r} in the recipe; it has: {', '.join(names)}")
    index = 0 if name is None else names.index(name)
    for earlier in recipe.stages[:index]:
        trained = [part for part in ("vision", "audio") if earlier.train.get(part, "frozen") != "frozen"]
        if trained:
            raise RecipeError(
                f"stages.{name}: the stage {earlier.name!r} before it trains the {trained[0]} tower, so features can "
                "only be kept once that has run; leave it to `mmpeft run`"
            )
    return index, recipe.stages[index]


def _prepared(recipe: Recipe, index: int, stage: StageConfig) -> tuple[MultimodalTrainer, TrainData]:
    """The stage's trainer as a run has it before the first step: what it computes in decides what is kept."""
    if recipe.data.streaming:
        raise RecipeError(
            "data.streaming: a stream's samples are not known before it is read; set data.cache.features: true, and "
            "features are kept as `mmpeft run` reads them"
        )
    state, directory = PartialState(), RunDirectory(recipe.output)
    base = resolve_base(recipe, directory.base_model, base_hash(recipe))
    processor = load_processor(base, max_pixels=recipe.data.max_pixels, trust_remote_code=recipe.trust_remote_code)
    with state.main_process_first():
        dataset = load_train(recipe, processor)
        measure(recipe, dataset)
    assert not isinstance(dataset, Stream)
    prepared = prepare_stage(recipe, stage, StageStart(base=base, carried={}), seed=recipe.seed)
    batch = plan_batch(recipe, data_processes(stage, state.num_processes))
    trainer = make_trainer(
        recipe,
        stage,
        prepared,
        (dataset, None),
        folder=directory.stage(index, stage.name),
        batch=batch,
        steps=count_steps(stage, len(dataset), batch.size),
    )
    return trainer, dataset


def _fill(
    trainer: MultimodalTrainer, cache: FeatureCache, dataset: TrainData, on_progress: Progress | None
) -> dict[str, int]:
    """Run the towers over what is not kept; returns the figures of `Filled`."""
    counts = dict.fromkeys(("media", "present", "written", "refused", "bytes"), 0)
    # Of several processes each takes its share.
    mine = slice(PartialState().process_index, None, PartialState().num_processes)
    shares = [(part, one_of_each_media(part)[mine]) for part in parts_of(dataset)]
    total = sum(len(indices) for _, indices in shares)
    model: Any = trainer.model
    model.train()
    seen: set[str] = set()
    # Towers compute as they would in training.
    with trainer.computing.on():
        for done, carrier in enumerate(_carriers(trainer, shares), start=1):
            if carrier is not None and carrier["key"] and carrier["key"] not in seen:
                seen.add(carrier["key"])
                counts["media"] += 1
                outcome, size = _keep(trainer, cache, carrier)
                counts[outcome] += 1
                counts["bytes"] += size
            if on_progress is not None:
                on_progress(done, total)
    return counts


def _keep(trainer: MultimodalTrainer, cache: FeatureCache, carrier: dict[str, Any]) -> tuple[str, int]:
    """What became of one sample's media (`present`, `written` or `refused`), and the bytes kept."""
    store, kept = cache.store, carrier["tensors"]
    if kept is None and store.has(carrier["key"]) and (entry := store.read(carrier["key"])) is not None:
        kept = entry.tensors
    if kept is not None:
        return "present", _bytes(kept)
    with trainer.accelerator.autocast():
        computed = cache.plan.compute(trainer.model, carrier["media"])
    if store.write(carrier["key"], Entry(tensors=computed, expansion=carrier["rest"])):
        return "written", _bytes(computed)
    if store.off is not None:
        raise OutputError(f"{store.off}; free space there, or set data.cache.directory")
    return "refused", 0


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _carriers(trainer: MultimodalTrainer, shares: list[tuple[Any, list[int]]]) -> Iterator[dict[str, Any] | None]:
    """Of each sample what a batch says of its features; None if the cut to `max_length` left no medium."""
    collate: Any = trainer.data_collator
    workers = trainer.args.dataloader_num_workers
    for part, indices in shares:
        loader: Any = DataLoader(part, sampler=indices, batch_size=None, num_workers=workers, collate_fn=_as_it_is)
        for sample in loader:
            carriers = collate([sample]).get("features", [])
            yield carriers[0] if carriers else None


def _as_it_is(sample: Any) -> Any:
    return sample
