"""What is put on a Trainer's model while it trains, and taken off again."""

import pytest
import torch
from transformers import TrainingArguments

from mmpeft import MultimodalCollator, MultimodalTrainer
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


def test_metrics_read_whole_logits(tmp_path):
    trainer, batch = trainer_of(tmp_path, "llava", chunked_loss=True)
    with trainer.computing.on():
        assert trainer.model(**batch).logits.shape[1] == 0
    trainer.compute_metrics = lambda prediction: {}
    with trainer.computing.on():
        assert trainer.model(**batch).logits.shape[1] == len(batch["logits_to_keep"])


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
