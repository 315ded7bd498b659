"""A recipe's `compute` block on a stage's model: what is switched on, and what it spared."""

from typing import Any

from transformers import TrainingArguments

from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError
from mmpeft.core.speed import Speedup
from mmpeft.models.head_loss import AUTO_ENTRIES, HeadFigures, unchunkable
from mmpeft.training.computing import Compute
from mmpeft.training.trainer import MultimodalTrainer

FLOAT32 = 4
"""Bytes of a logit where its loss is computed."""


def plan_compute(recipe: Recipe, model: Any) -> Compute:
    """What the Trainer is asked for.

    Raises:
        RecipeError: the recipe asks for what the model cannot do; says why.
    """
    switch = recipe.compute.chunked_loss
    obstacle = unchunkable(model)
    if switch is True and obstacle:
        raise RecipeError(f"compute.chunked_loss: {obstacle}; leave it out")
    return Compute(
        chunked_loss=None if switch == "auto" else switch,
        spare_casts=recipe.compute.spare_casts,
        spare_cache=recipe.compute.spare_cache,
    )


def supervised_only(recipe: Recipe, model: Any, args: TrainingArguments) -> bool | None:
    """Whether batches keep the logits of supervised positions only; None: where the model's forward offers it."""
    # Label smoothing reads the logits of every position.
    if args.label_smoothing_factor or not recipe.compute.supervised_only:
        return False
    return True if unchunkable(model) is None else None


def compute_speedups(recipe: Recipe, trainer: MultimodalTrainer) -> list[Speedup]:
    """What the block spared a stage that has trained."""
    head = trainer.computing.head or HeadFigures()
    return [
        _supervised(recipe, trainer, head),
        _chunked(recipe, trainer, head),
        _casts(recipe, trainer),
        _cache(recipe, trainer),
        Speedup(
            name="compute.checkpointing",
            on=bool(trainer.args.activation_checkpointing),
            why="it was asked for" if trainer.args.activation_checkpointing else "memory sufficed without it",
        ),
    ]


def _supervised(recipe: Recipe, trainer: MultimodalTrainer, head: HeadFigures) -> Speedup:
    name = "compute.supervised_only"
    if getattr(trainer.data_collator, "supervised_only", False):
        saved = {"logits": float(head.positions - head.kept)}
        return Speedup(name=name, on=True, why="logits are computed where a label is predicted", saved=saved)
    if not recipe.compute.supervised_only:
        return Speedup(name=name, on=False, why="compute.supervised_only is false")
    smoothed = trainer.args.label_smoothing_factor
    why = "label smoothing reads every logit" if smoothed else "the model's forward was not tested with it"
    return Speedup(name=name, on=False, why=why)


def _chunked(recipe: Recipe, trainer: MultimodalTrainer, head: HeadFigures) -> Speedup:
    name, switch = "compute.chunked_loss", recipe.compute.chunked_loss
    if head.chunked:
        why = "it was asked for" if switch is True else f"{head.entries:,} logits of a forward exceed {AUTO_ENTRIES:,}"
        saved = {"bytes": float(FLOAT32 * (head.entries - head.largest))}
        return Speedup(name=name, on=True, why=why, saved=saved)
    if switch is False:
        return Speedup(name=name, on=False, why="compute.chunked_loss is false")
    spread = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    why = (
        unchunkable(trainer.model)
        or ("the head's weights are spread over processes" if spread else None)
        or f"the most logits of a forward are {head.entries:,}, and {AUTO_ENTRIES:,} fit"
    )
    return Speedup(name=name, on=False, why=why)


def _casts(recipe: Recipe, trainer: MultimodalTrainer) -> Speedup:
    name, layers = "compute.spare_casts", trainer.computing.uncast
    if layers:
        saved = {"casts a forward": float(2 * layers)}
        return Speedup(name=name, on=True, why="LoRA takes its inputs in half precision as they are", saved=saved)
    asked = recipe.compute.spare_casts
    why = "no LoRA runs in half precision by autocast" if asked else "compute.spare_casts is false"
    return Speedup(name=name, on=False, why=why)


def _cache(recipe: Recipe, trainer: MultimodalTrainer) -> Speedup:
    name = "compute.spare_cache"
    if trainer.computing.spares_cache():
        return Speedup(name=name, on=True, why="training reads no keys and values of earlier forwards")
    asked = recipe.compute.spare_cache
    why = "models of this type were not tested with it" if asked else "compute.spare_cache is false"
    return Speedup(name=name, on=False, why=why)
