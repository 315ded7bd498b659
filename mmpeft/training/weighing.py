"""A step's loss as the mean over its labelled tokens, however it is cut into micro-batches.

transformers 5.24 hands the number of a step's labelled tokens to models that say they take it, and trusts them. Two
kinds of them are wrong, and their losses would depend on the cut; and one loss is another than it should be
(tests/training/test_weighing.py passes without what this does once they are mended):

    Qwen2.5-VL's line       says it takes none (`accepts_loss_kwargs`), but hands all it is given to its loss: what
                            takes `shift_labels` from there, as collators with `supervised_only` make them, takes it
    Qwen2-Audio's           says it takes it, and averages each micro-batch by itself: four count four times
    label smoothing         of all but text models compares each token with what the model says of the next one
"""

from functools import partial
from typing import Any

import torch
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from mmpeft.models.base import base_of


def weigh_tokens(trainer: Trainer) -> bool:
    """Make a Trainer's losses means over labelled tokens, where the collator is one of ours; whether they are."""
    supervised_only = getattr(trainer.data_collator, "supervised_only", None)
    if supervised_only:
        trainer.model_accepts_loss_kwargs = True
        return True
    if supervised_only is not None and trainer.compute_loss_func is None:
        if trainer.label_smoother is not None:
            trainer.compute_loss_func = partial(trainer.label_smoother, shift_labels=True)
        elif not _adds_to_it(trainer.model):
            trainer.compute_loss_func = token_mean
    return trainer.compute_loss_func is not None


def token_mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """The cross-entropy of the labelled tokens, by the number of those of a step; a Trainer's `compute_loss_func`.

    Args:
        outputs: with `logits` [rows, columns, vocabulary].
        labels: [rows, columns], `IGNORE_INDEX` where nothing is learned.
        num_items_in_batch: default: of this micro-batch.
    """
    logits = outputs["logits"]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)


def _adds_to_it(model: Any) -> bool:
    """Whether the model adds to the cross-entropy, as mixtures of experts may add the balance of their routers."""
    base = base_of(model)
    config = getattr(base, "config", None)
    text = config.get_text_config() if config is not None else None
    return bool(getattr(text, "output_router_logits", False))
