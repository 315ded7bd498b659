"""Activation checkpointing under packed rows and the loss in chunks: the same loss and gradients, for each family."""

import pytest
import torch

from mmpeft.data.packing import PackedCollator
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.head_loss import head_loss_on
from mmpeft.models.positions import with_positions
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.models import MODELS
from tests.families.test_adapters import LORA, PROJECTOR, scattered
from tests.families.test_packing import PACKED, rows_of


def taken(model, batch):
    model.zero_grad()
    vocabulary = model.get_base_model().config.get_text_config().vocab_size
    seen = []
    layers = model.get_base_model().get_decoder().layers
    hooks = [layer.self_attn.register_forward_hook(lambda *_: seen.append(1)) for layer in layers]
    with tree_attention_on(model), head_loss_on(model, chunked=True, chunk_entries=5 * vocabulary):
        loss = model(**with_positions(model, batch), use_cache=False).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, len(seen) / len(layers)


@pytest.mark.parametrize("family", PACKED)
def test_layers_computed_again_in_backward_give_the_same(family):
    model, processor = MODELS[family]()
    batch = PackedCollator(processor, supervised_only=True)(rows_of(family, processor))
    # In eval there is no checkpointing; nothing here draws at random.
    adapted = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).train()
    loss, gradients, once = taken(adapted, batch)
    adapted.activation_checkpointing_enable({"use_reentrant": False})
    found, again, twice = taken(adapted, batch)
    assert (once, twice) == (1, 2)
    assert found == pytest.approx(loss, rel=1e-6)
    assert again.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max()), msg=name)
