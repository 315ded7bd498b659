"""A recipe's `data.cache.tokens` on a stage: texts tokenised once, and how many that spared."""

from typing import Any

import torch

from mmpeft.config.recipe import Recipe
from mmpeft.core.speed import Speedup
from mmpeft.data.mixture import MixedDataset
from mmpeft.data.stream_mixture import Stream
from mmpeft.data.token_cache import TokenCache
from mmpeft.pipeline.data import TrainData
from mmpeft.training.trainer import MultimodalTrainer

NAME = "data.cache.tokens"


class KeptTokens:
    """What a stage finds and keeps of its texts; they go from stage to stage with the data set.

    Args:
        dataset: what the stage trains on, before it does. Of a stream nothing is kept: its samples mostly come up once.
    """

    def __init__(self, recipe: Recipe, dataset: TrainData) -> None:
        self.why = _obstacle(recipe, dataset)
        self.caches: list[TokenCache] = []
        parts: list[Any] = [part.dataset for part in dataset.parts] if isinstance(dataset, MixedDataset) else [dataset]
        for part in parts if self.why is None else ():
            self.caches.append(part.keep_tokens())

    def speedup(self, trainer: MultimodalTrainer) -> Speedup:
        """What was spared in the stage, in all processes; each has to ask."""
        if self.why is not None:
            return Speedup(name=NAME, on=False, why=self.why)
        found, new = (sum(figures) for figures in zip(*(cache.counts() for cache in self.caches), strict=True))
        counts = torch.tensor([float(found), float(new)], device=trainer.args.device)
        found, new = map(int, trainer.accelerator.reduce(counts, reduction="sum").tolist())
        return Speedup(
            name=NAME,
            on=True,
            why=f"{new:,} of {found + new:,} texts were tokenised; a worker knows those that it has seen itself",
            saved={"texts": found},
        )


def _obstacle(recipe: Recipe, dataset: TrainData) -> str | None:
    if not recipe.data.cache.tokens:
        return f"{NAME} is false"
    return "a stream's samples mostly come up once" if isinstance(dataset, Stream) else None
