"""A step's loss as the mean over its labelled tokens, however it is cut into micro-batches.

transformers 5.24 hands the number of a step's labelled tokens to models that say they take it, and trusts them. Two
kinds of them are wrong, and their losses would depend on the cut (tests/training/test_weighing.py passes without
what this does once they are mended):

    Qwen2.5-VL's line       says it takes none (`accepts_loss_kwargs`), but hands all it is given to its loss: what
                            takes `shift_labels` from there, as collators with `supervised_only` make them, takes it
    Qwen2-Audio's           says it takes it, and averages each micro-batch by itself: four count four times
"""

import inspect
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss


def weigh_tokens(trainer: Trainer) -> bool:
    """Make a Trainer's losses means over labelled tokens, where the collator is one of ours; whether they are."""
    supervised_only = getattr(trainer.data_collator, "supervised_only", None)
    smoothed = trainer.label_smoother is not None
    if supervised_only or (smoothed and _takes_anything(trainer.model)):
        trainer.model_accepts_loss_kwargs = True
        return True
    own = supervised_only is None or smoothed or trainer.compute_loss_func is not None or _adds_to_it(trainer.model)
    if not own:
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


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _takes_anything(model: Any) -> bool:
    parameters = inspect.signature(_base(model).forward).parameters.values()
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _adds_to_it(model: Any) -> bool:
    """Whether the model adds to the cross-entropy, as mixtures of experts may add the balance of their routers."""
    config = getattr(_base(model), "config", None)
    text = config.get_text_config() if config is not None else None
    return bool(getattr(text, "output_router_logits", False))
