"""A recipe's `data.cache.tokens` on a stage: texts tokenised once, and how many that spared."""

from mmpeft.config.recipe import Recipe
from mmpeft.core.speed import Speedup
from mmpeft.data.stream_mixture import Stream
from mmpeft.data.token_cache import TokenCache
from mmpeft.pipeline.data import TrainData, parts_of
from mmpeft.training.trainer import MultimodalTrainer

NAME = "data.cache.tokens"


class KeptTokens:
    """What a stage finds and keeps of its texts; they go from stage to stage with the data set.

    Args:
        dataset: what the stage trains on, before it does. Of a stream nothing is kept: its samples mostly come up once.
    """

    def __init__(self, recipe: Recipe, dataset: TrainData) -> None:
        self.why = _obstacle(recipe, dataset)
        parts = parts_of(dataset) if self.why is None else []
        self.caches: list[TokenCache] = [part.keep_tokens() for part in parts]

    def speedup(self, trainer: MultimodalTrainer) -> Speedup:
        """What was spared in the stage, in all processes; each has to ask."""
        if self.why is not None:
            return Speedup(name=NAME, on=False, why=self.why)
        found, new = (sum(figures) for figures in zip(*(cache.counts() for cache in self.caches), strict=True))
        found, new = trainer.of_all_processes(found, new)
        return Speedup(
            name=NAME,
            on=True,
            why=f"{new:,} of {found + new:,} texts were tokenised; workers, epochs and stages share them{self._rest()}",
            saved={"texts": found},
        )

    def _rest(self) -> str:
        limits = [cache.limit_bytes for cache in self.caches if cache.full]
        return f"; what does not fit into {limits[0] >> 20} MiB is tokenised each time" if limits else ""


def _obstacle(recipe: Recipe, dataset: TrainData) -> str | None:
    if not recipe.data.cache.tokens:
        return f"{NAME} is false"
    return "a stream's samples mostly come up once" if isinstance(dataset, Stream) else None
