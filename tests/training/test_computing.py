"""What is put on a Trainer's model while it trains, and taken off again."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from mmpeft import MultimodalCollator, MultimodalTrainer
from mmpeft.core.errors import RecipeError
from mmpeft.data.encode import encode_sample
from mmpeft.training.computing import Compute
from tests.families.models import MODELS
from tests.families.samples import first_medium


def trainer_of(folder, family, **compute):
    model, processor = MODELS[family]()
    rows = [encode_sample(processor, *first_medium(model, number)) for number in range(2)]
    args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", per_device_eval_batch_size=2)
    collator = MultimodalCollator(processor, supervised_only=True)
    return MultimodalTrainer(
        model=model.eval(), args=args, eval_dataset=rows, data_collator=collator, compute=Compute(**compute)
    ), collator(rows)


@pytest.mark.parametrize("family", MODELS)
def test_a_forward_in_training_keeps_no_keys_and_values_and_has_the_same_loss(tmp_path, family):
    losses, kept = [], []
    for spared in (False, True):
        trainer, batch = trainer_of(tmp_path, family, spare_cache=spared)
        with trainer.computing.on(), torch.no_grad():
            out = trainer.model(**batch)
            # The Trainer of transformers 5.24 says so to the outer of two configurations, which some families read.
            assert out.get("cache") is None or not spared
            kept.append(out.get("cache") is not None)
            # As generation does.
            without = {key: value for key, value in batch.items() if "logits" not in key and "labels" not in key}
            assert trainer.model(**without, use_cache=True).get("cache") is not None
        losses.append(out.loss)
    assert torch.equal(*losses)
    assert family != "llava" or kept == [True, False]


def test_evaluation_inside_training_puts_nothing_on_twice(tmp_path):
    trainer, _ = trainer_of(tmp_path, "llava")
    model, head = trainer.model, trainer.model.get_output_embeddings()

    def hooks():
        return len(model._forward_pre_hooks), len(model._forward_hooks), len(head._forward_pre_hooks)

    before = hooks()
    with trainer.computing.on():
        once = hooks()
        with trainer.computing.on():
            assert hooks() == once
        assert hooks() == once
    assert before == hooks() == (0, 0, 0)
    assert once == (4, 1, 1)


def test_metrics_of_logits_ask_for_a_collator_that_keeps_all(tmp_path):
    trainer, _ = trainer_of(tmp_path, "llava")
    processor = MODELS["llava"]()[1]
    given = {"model": trainer.model, "args": trainer.args, "compute_metrics": lambda prediction: {}}
    with pytest.raises(RecipeError, match="supervised_only=False"):
        MultimodalTrainer(data_collator=trainer.data_collator, **given)
    whole = MultimodalCollator(processor, supervised_only=False)
    metered = MultimodalTrainer(data_collator=whole, eval_dataset=trainer.eval_dataset, **given)
    batch = whole([trainer.eval_dataset[index] for index in range(2)])
    with metered.computing.on():
        assert metered.model(**batch).logits.shape[:2] == batch["labels"].shape


def test_a_process_trains_on_one_device(tmp_path, caplog):
    model, processor = MODELS["llava"]()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=3)
    assert args.n_gpu <= 1
    args._n_gpu = 4
    trainer = MultimodalTrainer(model=model, args=args, data_collator=MultimodalCollator(processor))
    assert args.train_batch_size == 3
    assert trainer._wrap_model(trainer.model) is trainer.model
    assert "4 devices are here" in caplog.text


class Moves(TorchDispatchMode):
    """Whether copies to another device waited for it."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.waits.append(not (kwargs or {}).get("non_blocking"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_batches_are_moved_without_waiting_for_the_device(tmp_path, monkeypatch, pinned):
    trainer, _ = trainer_of(tmp_path, "llava")
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    with Moves() as moves:
        moved = trainer._prepare_input({"pixel_values": torch.zeros(2), "more": [torch.ones(1)]})
    assert moved["pixel_values"].is_meta
    assert moved["more"][0].is_meta
    assert moves.waits == [not pinned] * 2


def test_figures_are_those_of_training_alone(tmp_path):
    trainer, _ = trainer_of(tmp_path, "llava")
    trainer.train_dataset, trainer.args.max_steps = trainer.eval_dataset, 1
    trainer.model.train()
    trainer.train()
    head, last = trainer.computing.head, trainer.computing.last
    counted = head.positions, last.tokens
    assert min(counted) > 0
    trainer.evaluate()
    assert (trainer.computing.head, trainer.computing.last) == (head, last)
    assert (head.positions, last.tokens) == counted


@pytest.mark.parametrize(
    ("compute", "args", "why"),
    [
        ({}, {}, None),
        ({"recompute": False}, {}, "compute.checkpointing is false"),
        ({"compile": True}, {}, None),
        ({}, {"optim": OptimizerNames.LOMO}, "optimizer lomo updates weights in the backward"),
        ({}, {"optim": OptimizerNames.GALORE_ADAMW_LAYERWISE}, "optimizer galore_adamw_layerwise updates"),
        ({}, {"activation_checkpointing": True}, "already"),
    ],
)
def test_it_says_why_a_micro_batch_would_not_run_again(tmp_path, compute, args, why):
    trainer, _ = trainer_of(tmp_path, "llava", **compute)
    for name, value in args.items():
        setattr(trainer.args, name, value)
    found = trainer.computing.why_not_recomputed()
    assert found is None if why is None else why in found


def test_padded_batches_go_without_a_mask_and_are_counted_all_the_same(tmp_path):
    losses, seen = [], []
    for spared in (False, True):
        trainer, batch = trainer_of(tmp_path, "llava", spare_mask=spared)
        decoder = trainer.model.get_decoder()
        decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs.get("attention_mask") is None), with_kwargs=True
        )
        trainer.train_dataset = trainer.eval_dataset
        trainer.args.max_steps, trainer.args.per_device_train_batch_size = 1, 2
        trainer.train()
        losses.append(trainer.state.log_history[-1]["train_loss"])
        assert trainer.tokens_trained == int(batch["attention_mask"].sum())
    assert seen == [False, True]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
