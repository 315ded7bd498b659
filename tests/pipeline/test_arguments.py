import math

import torch

import mmpeft
from mmpeft import Recipe
from mmpeft.pipeline.arguments import plan_batch, training_arguments
from mmpeft.training.callbacks import read_metrics
from tests.project import write_project

STAGE = {"name": "stage", "train": {"projector": "full"}, "learning_rate": 1e-3, "max_steps": 3}


def arguments(trainer, **data):
    recipe = Recipe.from_dict(
        {"model": "m", "data": {"train": "a.json", **data}, "stages": [STAGE | {"trainer": trainer}], "device": "cpu"}
    )
    batch = plan_batch(recipe, 1)
    return training_arguments(recipe, recipe.stages[0], output=recipe.output, batch=batch, steps=3, dtype=torch.float32)


def test_a_trainer_block_has_the_last_word_on_what_the_recipe_does_not_own():
    assert not arguments({}).logging_nan_inf_filter
    assert arguments({"logging_nan_inf_filter": True}).logging_nan_inf_filter
    assert not arguments({}).dataloader_pin_memory
    # Also with workers that are counted later.
    assert arguments({"dataloader_prefetch_factor": 4}).dataloader_prefetch_factor == 4


def test_a_loss_that_is_no_number_is_told_as_such(tmp_path):
    stage = {"name": "a", "train": {"projector": "full"}, "learning_rate": 1e30, "max_steps": 4}
    path = write_project(tmp_path, stages=[stage])
    mmpeft.run(Recipe.from_yaml(path))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "stages" / "01-a" / "metrics.jsonl")]
    assert math.isfinite(losses[0])
    assert math.isnan(losses[-1])
    assert (tmp_path / "run" / "report.html").exists()
