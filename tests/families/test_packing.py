"""Packed rows are exact: loss and gradients are those of the samples one by one, for every family that packs."""

import pytest
import torch

from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.data.packing import PackedCollator
from mmpeft.data.types import Media
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.positions import with_positions
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.models import MODELS, SINGLE_TURN
from tests.families.samples import SIZES, picture, sample_of
from tests.families.test_adapters import LORA, PROJECTOR, scattered

PACKED = [name for name, make in MODELS.items() if family_of(make()[0]).packable]


def rows_of(family, processor):
    first, second = (Media(images=[picture(SIZES[number], number)]) for number in (0, 1))
    made = [
        (sample_of("<image>\nWhat is it?", "a cat", images=1), first),
        (sample_of("1 + 1?", "2"), Media()),
        (sample_of("<image>\nWhich colour is it?", "red and blue", images=1), first),
        (
            sample_of("<image>\nWho?", "a", "And what else <image>?", "b", images=2),
            Media(images=[*second.images, *first.images]),
        ),
        (sample_of("<image>\nWhat is it not?", "a dog", images=1), first),
    ]
    # Some families take one question about pictures.
    usable = [each for number, each in enumerate(made) if family not in SINGLE_TURN or number not in (1, 3)]
    return [encode_sample(processor, *each) for each in usable]


def one_by_one(model, processor, rows):
    """Mean loss over all labels, and gradients, of plain transformers with a sample a forward."""
    labels = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    collate = MultimodalCollator(processor, supervised_only=False)
    model.zero_grad()
    total = 0.0
    for row in rows:
        loss = model(**collate([row]), num_items_in_batch=labels).loss
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", PACKED)
def test_loss_and_gradients_are_those_of_the_samples_one_by_one(family, share):
    model, processor = MODELS[family]()
    rows = rows_of(family, processor)
    adapted = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).eval()
    loss, expected = one_by_one(adapted, processor, rows)
    batch = PackedCollator(processor, share=share)(rows)
    assert batch["input_ids"].shape[0] == 1
    lengths = sum(len(row["input_ids"]) for row in rows)
    assert (batch["input_ids"].shape[1] < lengths) == (share and family != "paligemma")
    adapted.zero_grad()
    with tree_attention_on(adapted):
        found = adapted(**with_positions(adapted, batch)).loss
        found.backward()
    torch.testing.assert_close(found.item(), loss, rtol=1e-5, atol=1e-6)
    packed = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert packed.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5 * float(scale), msg=name)
