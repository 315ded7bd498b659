"""Batches padded on the right give the same loss and gradients without their mask, for every family that allows it."""

import pytest
import torch

from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.encode import encode_sample
from mmpeft.families.registry import family_of
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.mask_free import CAUSAL, needs_mask, without_mask
from mmpeft.models.tree_attention import EXACT
from tests.families.models import MODELS
from tests.families.samples import first_medium
from tests.families.test_adapters import LORA, PROJECTOR, scattered
from tests.models.test_tree_attention import INSIDE, llava_around
from tests.tiny import tiny_processor


def taken(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compared(model, processor):
    rows = [encode_sample(processor, *first_medium(model, number)) for number in range(3)]
    batch = MultimodalCollator(processor)(rows)
    assert not batch["attention_mask"].all()
    adapted = scattered(get_peft_model(model, {**PROJECTOR, **LORA})).eval()
    assert needs_mask(adapted) is None
    loss, gradients = taken(adapted, batch)
    hook = adapted.register_forward_pre_hook(without_mask, with_kwargs=True)
    found, free = taken(adapted, batch)
    hook.remove()
    assert found == pytest.approx(loss, rel=1e-5)
    assert free.keys() == gradients.keys()
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(free[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("family", sorted(set(MODELS) - {"paligemma", "qwen2_5_omni"}))
def test_loss_and_gradients_are_the_same_without_it(family):
    compared(*MODELS[family]())


@pytest.mark.parametrize("model_type", sorted(EXACT - INSIDE))
def test_so_they_are_for_every_type_of_language_model(model_type):
    processor = tiny_processor()
    compared(llava_around(model_type, processor), processor)


def test_families_whose_prompts_are_seen_both_ways_keep_it():
    model, _ = MODELS["paligemma"]()
    assert family_of(model).token_types == "suffix"
    assert "seen both ways" in needs_mask(model)
    omni, _ = MODELS["qwen2_5_omni"]()
    assert "type 'qwen2_5_omni_text' was not tested" in needs_mask(omni)
    assert "stablelm" not in CAUSAL
    assert "was not tested" in needs_mask(llava_around("stablelm", tiny_processor()))
