"""Half precision: frozen weights are never cast, and inputs of LoRA are not cast to and fro; the same numbers."""

import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft.data.packing import PackedCollator
from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.checkpoint import save_adapter
from mmpeft.models.spared_casts import casts_spared
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.test_packing import rows_of
from tests.tiny import tiny_llava, tiny_processor

LORA = {"language": {"r": 4, "lora_alpha": 8}}
TRAINS = {
    "projector": {"projector": "full"},
    "lora": LORA,
    "both": {"projector": "full", **LORA},
    "dora": {"projector": "full", "language": {"r": 4, "use_dora": True}},
}


class Casts(TorchDispatchMode):
    """Casts between precisions: how many, their bytes, and those of the given weights."""

    def __init__(self, weights):
        super().__init__()
        self.places = {weight.untyped_storage().data_ptr() for weight in weights}
        self.count = self.bytes = self.of_weights = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            self.count += 1
            self.bytes += out.nbytes + args[0].nbytes
            self.of_weights += args[0].untyped_storage().data_ptr() in self.places
        return out


def step(model, batch, spared):
    """Loss, gradients and casts of a step under autocast."""
    model.zero_grad()
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    assert {weight.dtype for weight in frozen} == {torch.bfloat16}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    layers = casts_spared(model) if spared else casts_spared(torch.nn.Identity())
    with tree_attention_on(model), layers, Casts(frozen) as casts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, casts


@pytest.mark.parametrize("train", TRAINS)
def test_a_step_gives_the_same_numbers_and_casts_no_frozen_weight(train):
    processor = tiny_processor()
    model = get_peft_model(tiny_llava(processor).to(torch.bfloat16), TRAINS[train]).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = PackedCollator(processor)(rows_of("llava", processor))
    loss, gradients, before = step(model, batch, spared=False)
    found, spared, after = step(model, batch, spared=True)
    assert found == loss
    assert spared.keys() == gradients.keys()
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.equal(spared[name], gradient), name
    assert (after.bytes < 0.7 * before.bytes) is (train in ("lora", "both"))
    if train != "dora":  # whose norms are those of the frozen weights and their change, in float32
        assert before.of_weights == after.of_weights == 0


def test_the_adapter_that_was_trained_so_is_saved_in_float32(tmp_path):
    processor = tiny_processor()
    model = get_peft_model(tiny_llava(processor).to(torch.bfloat16), TRAINS["both"]).train()
    batch = PackedCollator(processor)(rows_of("llava", processor))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        step(model, batch, spared=True)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name
    save_adapter(model, tmp_path, processor=processor)
    back = PeftModel.from_pretrained(tiny_llava(processor).to(torch.bfloat16), str(tmp_path))
    kept = {name: p for name, p in back.named_parameters() if "lora" in name or "modules_to_save" in name}
    assert len(kept) > 5
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(kept[name].float(), parameter, rtol=1e-2 if "modules" in name else 0, atol=0)
