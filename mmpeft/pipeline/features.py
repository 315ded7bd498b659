"""A recipe's `data.cache.features` on a stage: whether features are kept, and what that spared."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainingArguments

from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.core.speed import Speedup
from mmpeft.core.types import Part
from mmpeft.data.augment import varies_media
from mmpeft.data.cache_pays import CacheCase, cache_pays
from mmpeft.data.feature_store import FeatureStore, default_directory
from mmpeft.data.stream_mixture import Stream
from mmpeft.families.registry import family_of
from mmpeft.models.base import base_of
from mmpeft.models.features import FeaturePlan, Unplanned, plan_features
from mmpeft.models.feeding import projector_modules
from mmpeft.models.resting import RestingTowers
from mmpeft.pipeline.cutting import without_towers
from mmpeft.pipeline.data import TrainData, one_of_each_media
from mmpeft.training.features import FeatureCache
from mmpeft.training.main_process import on_main
from mmpeft.training.trainer import MultimodalTrainer

NAME = "data.cache.features"


_PROBES = 3
"""Samples by which the bytes of all features are estimated."""


def keep_features(recipe: Recipe, stage: StageConfig, trainer: MultimodalTrainer, dataset: TrainData) -> str:
    """Let a stage's trainer and its data use a feature cache where that is exact and pays.

    Args:
        trainer: of the stage, before it trains.
        dataset: what the stage trains on; one that kept features for the stage before no longer does, where this
            stage cannot.

    Returns:
        Why it is on or off, in one sentence.
    """
    plan = stage_plan(recipe, stage, trainer.model)
    obstacle = plan.reason if isinstance(plan, Unplanned) else _obstacle(recipe, stage, trainer)
    if obstacle or isinstance(plan, Unplanned):
        dataset.keep_features(None)
        return obstacle or ""
    store = FeatureStore(recipe.data.cache.directory or default_directory(), recipe.data.cache.limit_bytes)
    cache = FeatureCache(plan, store, towers=_resting(trainer))
    dataset.keep_features(store, plan.identity(trainer.model, _autocast(trainer.args)))
    on, why = on_main(lambda: _pays(recipe, trainer, dataset, cache))
    if not on:
        dataset.keep_features(None)
        return why
    if stage.train.get("projector", "frozen") == "frozen" and any(map(_trains_cached_projector, recipe.stages)):
        why += "; the projector runs each time, for it is frozen in this stage and trained in another"
    trainer.take_features(cache)
    if cache.towers is not None and _found(trainer, dataset):
        # The first update is the largest: towers are out of memory before it.
        cache.expect_kept()
    if trainer.cut is not None and on_main(lambda: _towers_rest(recipe, stage, trainer, dataset)):
        trainer.cut = replace(trainer.cut, costs=without_towers(trainer.cut.costs))
    return why


def stage_plan(recipe: Recipe, stage: StageConfig, model: Any) -> FeaturePlan | Unplanned:
    """What of a stage's model can be kept; cut alike in all stages, so that one stage finds what another kept."""
    train: dict[Part, Any] = dict(stage.train)
    for other in recipe.stages:
        if _trains_cached_projector(other):
            train["projector"] = other.train["projector"]
    return plan_features(model, train)


def expects_features(recipe: Recipe, stage: StageConfig, model: Any, dataset: TrainData) -> bool:
    """Whether a stage will keep features, as far as that can be told before a tower has run.

    What `auto` asks of the disk, and of features that earlier runs have kept, is not asked.
    """
    switch = recipe.data.cache.features
    varied = varies_media(recipe.data.augment)
    if switch is False or varied or isinstance(stage_plan(recipe, stage, model), Unplanned):
        return False
    if switch is True or isinstance(dataset, Stream):
        return bool(switch is True)
    shown = _epochs(recipe, len(dataset)) * _with_media(dataset)
    return shown > len(one_of_each_media(dataset)) > 0


def _trains_cached_projector(stage: StageConfig) -> bool:
    """Whether a stage trains the projector behind towers whose outputs are kept."""
    return stage.train.get("projector", "frozen") != "frozen" and _towers_frozen(stage)


def feature_speedup(trainer: MultimodalTrainer, why: str) -> Speedup:
    """What the cache spared a stage that has trained, in all processes; each has to ask.

    Args:
        why: what `keep_features` said.
    """
    cache = trainer.features
    if cache is None:
        return Speedup(name=NAME, on=False, why=why)
    hits, misses = trainer.of_all_processes(cache.hits, cache.misses)
    if cache.store.off is not None:
        why = f"{why}; nothing more was kept, for {cache.store.off}"
    if broken := cache.store.figures()["broken"]:
        why = f"{why}; {broken:,} damaged entries were made anew"
    return Speedup(
        name=NAME,
        on=True,
        why=f"{why}; towers ran for {misses:,} of {hits + misses:,} samples with media",
        saved={"tower_runs": hits, **({"device_bytes": cache.towers.bytes} if cache.towers and cache.rested else {})},
    )


def _obstacle(recipe: Recipe, stage: StageConfig, trainer: MultimodalTrainer) -> str | None:
    if varies_media(recipe.data.augment):
        return "data.augment varies pictures from epoch to epoch"
    plugin, base = trainer.args.deepspeed_plugin, base_of(trainer.model)
    shared_out = plugin is not None and plugin.zero_stage == 3 and stage.train.get("projector", "frozen") != "frozen"
    if shared_out and len(projector_modules(base, family_of(base))) > 1:
        return "the projector runs in the middle of the tower, and ZeRO-3 has shared it out"
    return None


def _resting(trainer: MultimodalTrainer) -> RestingTowers | None:
    """The towers, where they take memory of an accelerator that no other process counts on."""
    alone = trainer.args.world_size == 1 and trainer.args.device.type != "cpu"
    return RestingTowers(trainer.model) if alone else None


def _pays(recipe: Recipe, trainer: MultimodalTrainer, dataset: TrainData, cache: FeatureCache) -> tuple[bool, str]:
    """Whether features are worth keeping, and why."""
    switch = recipe.data.cache.features
    if switch != "auto":
        return switch, _asked(switch)
    if isinstance(dataset, Stream):
        return False, f"a stream does not say how often its media come again; {NAME}: true keeps them"
    media = one_of_each_media(dataset)
    probes = _probes(trainer, dataset, media)
    case = CacheCase(
        media=len(media),
        shown=_epochs(recipe, len(dataset)) * _with_media(dataset),
        # The directory is that of all runs: what counts is whether it holds what this one asks for.
        found=any(carrier["tensors"] is not None for carrier in probes),
        bytes_each=0,
        limit_bytes=cache.store.limit_bytes,
        free_bytes=cache.store.free_bytes(),
    )
    pays, why = cache_pays(case)
    if pays:
        # Only then is it worth running the towers on a few.
        pays, why = cache_pays(replace(case, bytes_each=_bytes_each(trainer, cache, probes)))
    return pays, why


def _found(trainer: MultimodalTrainer, dataset: Any) -> bool:
    """Whether features are kept already, by runs before this one, as far as a few samples tell."""
    if isinstance(dataset, Stream):
        return False
    probes = _probes(trainer, dataset, one_of_each_media(dataset))
    return bool(probes) and all(carrier["tensors"] is not None for carrier in probes)


def _towers_rest(recipe: Recipe, stage: StageConfig, trainer: MultimodalTrainer, dataset: Any) -> bool:
    """Whether a stage finds most features kept: because it shows its media more than once, or by runs before it."""
    media = len(one_of_each_media(dataset))
    again = 2 * media <= _passes(recipe, stage, len(dataset)) * _with_media(dataset)
    # Steps that are cut in another way sum in another order.
    return again or (not recipe.deterministic and _found(trainer, dataset))


def _with_media(dataset: Any) -> int:
    """Samples that have a picture, a film or a recording."""
    return sum(map(bool, map(dataset.media_key, range(len(dataset)))))


def _asked(switch: bool) -> str:
    return "it was asked for" if switch else f"{NAME} is false"


def _probes(trainer: MultimodalTrainer, dataset: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
    """What batches say of the features of a few samples, spread over these, whose data keeps features already."""
    collate: Any = trainer.data_collator
    chosen = indices[:: max(1, len(indices) // _PROBES)][:_PROBES]
    return [carrier for index in chosen for carrier in collate([dataset[index]]).get("features", ())]


def _bytes_each(trainer: MultimodalTrainer, cache: FeatureCache, probes: list[dict[str, Any]]) -> float:
    """Bytes of the features of one sample's media, on average over a few."""
    total = 0
    for carrier in probes:
        features = carrier["tensors"]
        if features is None:
            with trainer.accelerator.autocast():
                features = cache.plan.compute(trainer.model, carrier["media"])
        total += sum(tensor.nbytes for tensor in features.values())
    return total / max(1, len(probes))


def _epochs(recipe: Recipe, samples: int) -> float:
    """How often all stages with frozen towers show each sample together."""
    return sum(_passes(recipe, stage, samples) for stage in recipe.stages if _towers_frozen(stage))


def _passes(recipe: Recipe, stage: StageConfig, samples: int) -> float:
    """How often a stage shows each sample."""
    return stage.max_steps * recipe.batch.size / samples if stage.max_steps else stage.epochs


def _towers_frozen(stage: StageConfig) -> bool:
    towers: tuple[Part, ...] = ("vision", "audio")
    return all(stage.train.get(part, "frozen") == "frozen" for part in towers)


def _autocast(args: TrainingArguments) -> torch.dtype | None:
    """The format of a training step under autocast; None without."""
    formats: Mapping[bool, torch.dtype] = {bool(args.fp16): torch.float16, bool(args.bf16): torch.bfloat16}
    return formats.get(True)
