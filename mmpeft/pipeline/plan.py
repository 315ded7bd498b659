"""What a recipe will do, worked out before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from accelerate import PartialState

from mmpeft.config.recipe import Recipe, StageConfig
from mmpeft.config.train import PartTraining
from mmpeft.core.types import Part
from mmpeft.methods.attach import check_carried, get_peft_model, trains_tower
from mmpeft.methods.checkpoint import saved_as
from mmpeft.methods.plan import describe_training
from mmpeft.pipeline.arguments import count_steps, learning_rates, plan_batch
from mmpeft.pipeline.base import skeleton


def carry_forward(carried: dict[Part, PartTraining], stage: StageConfig) -> dict[Part, PartTraining]:
    """How the parts of the adapter after a stage were trained, given those of the adapter before it."""
    if trains_tower(stage.train):
        return {}
    return {**carried, **{part: saved_as(training) for part, training in stage.train.items() if training != "frozen"}}


def plan_stages(
    recipe: Recipe, base: str, samples: int | None, *, sources: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """For each stage its samples, steps, batch and the table of parts, as plan.json holds them.

    Args:
        samples: of an epoch; None where that is not known.
        sources: of a mixture, each with `name`, `weight`, `samples` and `shown`.

    Raises:
        RecipeError: a stage's `train` block does not fit the model, or the batch the processes.
    """
    batch = plan_batch(recipe, PartialState().num_processes)
    carried: dict[Part, PartTraining] = {}
    rows = []
    for stage in recipe.stages:
        check_carried(stage.train, carried)
        model = get_peft_model(
            skeleton(base, trust_remote_code=recipe.trust_remote_code),
            _without_init(stage.train),
            carried=carried,
        )
        rows.append(
            {
                "name": stage.name,
                "samples": samples,
                **({"sources": list(sources)} if sources else {}),
                "steps": count_steps(stage, samples, batch.size),
                "epochs": stage.epochs,
                "batch": asdict(batch),
                "parts": describe_training(model, stage.train, learning_rates(stage)).to_dict(),
            }
        )
        carried = carry_forward(carried, stage)
    return rows


def _without_init(train: dict[Part, PartTraining]) -> dict[Part, PartTraining]:
    # PiSSA and OLoRA decompose weights, and a model on the meta device has none.
    return {part: _plain(training) for part, training in train.items()}


def _plain(training: PartTraining) -> PartTraining:
    if isinstance(training, dict):
        return {key: value for key, value in training.items() if key != "init_lora_weights"}
    return training
