"""Every first-class family, its head spared: the loss and gradients of plain transformers, padded and packed."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.packing import PackedCollator
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.head_loss import head_loss_on
from mmpeft.models.positions import with_positions
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.models import MODELS, SINGLE_TURN
from tests.families.samples import first_medium
from tests.families.test_adapters import LORA, PROJECTOR, scattered
from tests.families.test_packing import one_by_one, rows_of


def same(found, expected, gradients):
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        atol = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=atol, msg=name)


def rows_for(family, model, processor):
    if "image" in family_of(model).modalities:
        return rows_of(family, processor)
    return [encode_sample(processor, *first_medium(model, number)) for number in range(3)]


def averaged(model, processor, rows, labels):
    """`one_by_one` for a model that averages each sample by itself: the same cross-entropy, of its own logits."""
    collate = MultimodalCollator(processor, supervised_only=False)
    model.zero_grad()
    total = 0.0
    for row in rows:
        batch = collate([row])
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        loss = ForCausalLMLoss(logits, batch["labels"], logits.shape[-1], labels)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def taken(model, batch, labels):
    model.zero_grad()
    out = model(**with_positions(model, batch), num_items_in_batch=labels)
    out.loss.backward()
    return out, (out.loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_plain_transformers(family, chunked):
    model, processor = MODELS[family]()
    rows = rows_for(family, model, processor)
    adapted = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).eval()
    labels = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    own = family == "qwen2_audio"
    total, gradients = averaged(adapted, processor, rows, labels) if own else one_by_one(adapted, processor, rows)
    vocabulary = model.config.get_text_config().vocab_size
    packs = family_of(model).packable
    collators = [MultimodalCollator(processor, supervised_only=True)]
    collators += [PackedCollator(processor, supervised_only=True)] if packs else []
    for collator in collators:
        batch = collator(rows)
        with (
            tree_attention_on(adapted),
            head_loss_on(adapted, chunked=chunked, chunk_entries=5 * vocabulary) as figures,
        ):
            out, found = taken(adapted, batch, labels)
        rows_taken, columns = batch["input_ids"].shape
        kept = len(batch["logits_to_keep"])
        assert out.logits.shape[:2] == (rows_taken, 0 if chunked else kept)
        assert kept < columns or family in SINGLE_TURN
        assert (figures.positions, figures.kept) == (rows_taken * columns, rows_taken * kept)
        same(found, total, gradients)
