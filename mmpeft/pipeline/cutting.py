"""How a stage's steps are cut by cost: what the recipe asks for, on the data and the model at hand."""

import dataclasses
import math
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import DataError
from mmpeft.core.speed import Speedup
from mmpeft.data.balancing import Cut, Steps, fullest_step
from mmpeft.data.cutting import HIDDEN_SIZE, Bounds, CostModel
from mmpeft.data.problems import LISTED, Problem
from mmpeft.data.stream import StreamingDataset
from mmpeft.data.stream_mixture import StreamedMixture
from mmpeft.methods.plan import TrainingPlan
from mmpeft.models.base import base_of
from mmpeft.pipeline.arguments import Batch
from mmpeft.pipeline.data import TrainData, parts_of
from mmpeft.training.trainer import MultimodalTrainer

_PASSES = {"frozen": 1, "carried": 1, "lora": 2, "full": 3}
"""Products with a part's weights: forward; backward to what comes in; backward to the weights."""


def cuts_by_cost(recipe: Recipe, dataset: TrainData) -> bool:
    """Whether a recipe's steps are cut by what their samples cost: not those of a stream, which has no lengths."""
    asked = recipe.batch.balance or recipe.batch.tokens is not None
    return asked and not isinstance(dataset, StreamingDataset | StreamedMixture)


def measure(recipe: Recipe, dataset: TrainData) -> None:
    """Count the tokens of all samples if steps are cut by them, and see that each fits the budget.

    Raises:
        DataError: samples longer than `batch.tokens`, listed together; or one that cannot be measured.
    """
    if not cuts_by_cost(recipe, dataset):
        return
    budget = None if recipe.batch.tokens == "auto" else recipe.batch.tokens
    for part in parts_of(dataset):
        _check_budget(part, budget)


def _check_budget(dataset: Any, budget: int | None) -> None:
    tokens = dataset.lengths()["tokens"]
    longer = (tokens > budget).nonzero()[0] if budget is not None else []
    if not len(longer):
        return
    listed = []
    for index in map(int, longer[:LISTED]):
        sample = dataset.sample(index)
        reason = f"{int(tokens[index])} tokens"
        problem = Problem(index=sample.index, line=sample.line, id=sample.id, reason=reason)
        listed.append(f"\n  {problem.located(dataset.path)}")
    rest = f"\n  and {len(longer) - LISTED} more" if len(longer) > LISTED else ""
    raise DataError(
        f"{len(longer)} of {len(tokens)} samples of {dataset.path} are longer than batch.tokens ({budget}):"
        f"{''.join(listed)}{rest}\nraise batch.tokens to {int(tokens.max())}, cut them with data.max_length: {budget}, "
        "or shorten them"
    )


def plan_cut(
    recipe: Recipe,
    dataset: Any,
    args: TrainingArguments,
    *,
    batch: Batch,
    packs: bool,
    costs: CostModel,
    steps: int,
) -> Cut | None:
    """How a stage's steps are cut by cost; None if they are cut in their order.

    Args:
        dataset: with `lengths`, see `MultimodalDataset`.
        batch: as `plan_batch` has it.
        packs: whether samples go through the model as rows without padding.
        steps: optimizer steps of the stage, over all of which the fullest one is looked for.
    """
    if not cuts_by_cost(recipe, dataset) or args.train_sampling_strategy not in ("random", "sequential"):
        return None
    share = packs and recipe.batch.share_media
    budget = None if recipe.batch.tokens == "auto" else recipe.batch.tokens
    order = Steps(
        lengths=dataset.lengths,
        samples=len(dataset),
        size=batch.size,
        seed=recipe.seed,
        shuffle=args.train_sampling_strategy == "random",
        share_media=share,
        longest_first=recipe.batch.balance,
    )
    bounds = Bounds(
        tokens=budget,
        samples=None if budget is not None else batch.micro,
        packed=packs,
        share=share,
        spread=recipe.batch.balance,
    )
    accumulation = batch.accumulation
    if budget is not None:
        epochs = math.ceil(steps / len(order))
        # A feature cache may spare the towers; how many micro-batches a step has is settled before that is known.
        possible = {costs} if recipe.data.cache.features is False else {costs, without_towers(costs)}
        fullest = max(fullest_step(order, bounds, each, epochs) for each in possible)
        accumulation = math.ceil(fullest / batch.processes)
    return Cut(steps=order, bounds=bounds, costs=costs, accumulation=accumulation)


def cut_batch(batch: Batch, cut: Cut | None) -> Batch:
    """The batch as it is cut: of a budget of tokens as many micro-batches as the fullest step needs."""
    if cut is None or cut.bounds.tokens is None:
        return batch
    micro = math.ceil(batch.size / (cut.accumulation * batch.processes))
    return dataclasses.replace(batch, micro=micro, accumulation=cut.accumulation)


def cost_model(model: Any, plan: TrainingPlan) -> CostModel:
    """What samples cost, by the sizes of a model's parts and by which of them train."""
    base: Any = base_of(model)
    hidden = getattr(base.config.get_text_config(), "hidden_size", HIDDEN_SIZE)
    parts = {part.part: part for part in plan.parts}
    towers = sum(parts[name].parameters * _PASSES[parts[name].state] for name in ("vision", "audio") if name in parts)
    language = parts["language"]
    passes = max(2, _PASSES[language.state])
    vision = towers * _patches_a_token(base.config) / max(1, language.parameters * passes)
    return CostModel(attention=1 / (6 * hidden), vision=vision)


def without_towers(costs: CostModel) -> CostModel:
    """What samples cost where a cache has what the towers would give."""
    return dataclasses.replace(costs, vision=0.0)


def _patches_a_token(config: Any) -> float:
    """Patches of the vision tower that become one token of the language model, by the names that configs have."""
    vision = getattr(config, "vision_config", None)
    if merge := getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None):
        return float(merge) ** 2
    return 1 / float(getattr(config, "downsample_ratio", None) or 1) ** 2


def cut_speedups(recipe: Recipe, trainer: MultimodalTrainer) -> list[Speedup]:
    """What `batch.tokens` and `batch.balance` did in a stage that has been trained."""
    cut, figures = trainer.cut, trainer.cut_figures
    if cut is None or figures is None:
        why = _why_not(recipe, trainer)
        return [Speedup(name=name, on=False, why=why) for name in ("batch.tokens", "batch.balance")]
    tokens = Speedup(name="batch.tokens", on=False, why="the recipe gives none")
    if cut.bounds.tokens is not None:
        tokens = Speedup(
            name="batch.tokens",
            on=True,
            why=f"the fullest step takes {cut.accumulation} micro-batches of each process; the largest of all holds "
            f"{figures.largest} tokens, and {figures.plain_largest} if as many are cut in their order",
            saved={"tokens_in_the_largest": float(max(0, figures.plain_largest - figures.largest))},
        )
    if not cut.bounds.spread:
        return [tokens, Speedup(name="batch.balance", on=False, why=_why_not(recipe, trainer))]
    dearest = "process" if PartialState().num_processes > 1 else "micro-batch"
    balance = Speedup(
        name="batch.balance",
        on=True,
        why=f"the dearest {dearest} of a step costs {figures.imbalance:.3f} times the mean, and "
        f"{figures.plain_imbalance:.3f} times if steps are cut in their order",
        saved={} if cut.bounds.packed else {"padding_tokens": float(figures.plain_padding - figures.padding)},
    )
    return [tokens, balance]


def _why_not(recipe: Recipe, trainer: MultimodalTrainer) -> str:
    if isinstance(trainer.train_dataset, StreamingDataset | StreamedMixture):
        return "a stream's samples have no length before they are read"
    if not recipe.batch.balance:
        return "the recipe switches it off"
    return "the model's loss is a mean of each micro-batch, so it would depend on how a step is cut"
