"""The last layer's feed-forward part at supervised positions: the loss and gradients of all positions.

Every family runs so in tests/pipeline/test_exactness.py.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmpeft.data.packing import PackedCollator
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.head_loss import head_loss_on
from mmpeft.models.last_layer import last_layer_obstacle, last_layer_spared
from mmpeft.models.mask_free import CAUSAL
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.test_packing import rows_of
from tests.models.test_tree_attention import INSIDE, llava_around
from tests.tiny import tiny_processor

TRAIN = {"projector": "full", "language": {"r": 4, "lora_alpha": 8}}


def packed(processor):
    return PackedCollator(processor, supervised_only=True)(rows_of("llava", processor))


def step(model, batch):
    model.zero_grad()
    with tree_attention_on(model), head_loss_on(model), FlopCounterMode(display=False) as flops:
        loss = model(**batch).loss
        loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads, flops.get_total_flops()


def check(model, batch):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    loss, gradients, flops = step(model, batch)
    with last_layer_spared(model) as figures:
        found, spared, fewer = step(model, batch)
    assert 0 < figures.kept < figures.tokens
    assert found == pytest.approx(loss, rel=1e-6)
    assert fewer < flops
    assert spared.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(spared[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.norm()) + 1e-9)
    again = step(model, batch)
    assert again[0] == loss
    assert again[2] == flops


@pytest.mark.parametrize("model_type", sorted(CAUSAL - INSIDE - {"qwen3_5_text"}))
def test_every_type_of_language_model(model_type):
    processor = tiny_processor()
    model = get_peft_model(llava_around(model_type, processor), TRAIN).train()
    assert last_layer_obstacle(model) is None
    check(model, packed(processor))


def test_activation_checkpointing_runs_it_again_alike():
    processor = tiny_processor()
    model = get_peft_model(llava_around("llama", processor), TRAIN).train()
    batch = packed(processor)
    loss, gradients, _ = step(model, batch)
    model.base_model.model.activation_checkpointing_enable()
    with last_layer_spared(model):
        found, spared, _ = step(model, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(spared[name], gradient, rtol=1e-4, atol=1e-7)


def test_generation_and_whole_logits_are_left_alone():
    processor = tiny_processor()
    model = llava_around("llama", processor)
    batch = packed(processor)
    whole = {name: value for name, value in batch.items() if name not in ("logits_to_keep", "shift_labels", "labels")}
    with tree_attention_on(model), torch.no_grad():
        expected = model(**whole).logits
        with last_layer_spared(model):
            model(**batch)
            assert torch.equal(model(**whole).logits, expected)
