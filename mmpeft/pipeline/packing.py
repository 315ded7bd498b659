"""A recipe's `batch.packing` on a stage: whether samples stand in rows without padding, and what that spared."""

from typing import Any

from transformers import TrainingArguments

from mmpeft.config.recipe import BatchConfig, Recipe
from mmpeft.core.errors import RecipeError
from mmpeft.core.speed import Speedup
from mmpeft.models.tree_attention import row_obstacle


def packing_obstacle(recipe: Recipe, model: Any, args: TrainingArguments) -> str | None:
    """Why a stage's samples cannot go through the model as rows without padding; None if they can.

    Raises:
        RecipeError: the recipe asks for it where it would not be exact; says why.
    """
    obstacle = row_obstacle(model, "samples")
    if obstacle is None and args.label_smoothing_factor:
        obstacle = "label smoothing reads the logits of every position"
    if obstacle and recipe.batch.packing:
        raise RecipeError(f"batch.packing: {obstacle}; leave it out")
    return obstacle


def packs_rows(recipe: Recipe, model: Any, args: TrainingArguments) -> bool:
    """Whether a stage's samples go through the model as rows without padding; errors as `packing_obstacle`."""
    return packing_obstacle(recipe, model, args) is None and recipe.batch.packing is not False


def packing_speedups(
    batch: BatchConfig, obstacle: str | None, *, tokens: int, computed: int, padded: int
) -> list[Speedup]:
    """Of packed rows, and of the beginnings that samples on the same media share.

        padded    p p p p a a a -     12 of 16 tokens are samples'; a row computes 9,
                  p p p p b b - -     for two samples share p p p p

    Args:
        batch: says whether they were asked for.
        obstacle: why samples cannot share a row; None if they can.
        tokens: of all samples, those that are shared counted for each.
        computed: tokens that went through the language model.
        padded: tokens that padded batches of the same samples would have held.
    """
    on = obstacle is None and batch.packing is not False
    why = obstacle or ("the family can be packed exactly" if on else "batch.packing is false")
    shares = on and batch.share_media
    return [
        Speedup(name="batch.packing", on=on, why=why, saved={"tokens": padded - tokens} if on else {}),
        Speedup(
            name="batch.share_media",
            on=shares,
            why="samples on the same picture run what they begin with once"
            if shares
            else "batch.share_media is false"
            if on
            else "it needs batch.packing",
            saved={"tokens": tokens - computed} if shares else {},
        ),
    ]
