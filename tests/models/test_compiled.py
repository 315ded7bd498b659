"""Compiled layers: the same losses and gradients, and nothing is compiled again while rows change their length."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from mmpeft.data.encode import encode_sample
from mmpeft.data.packing import PackedCollator
from mmpeft.data.types import Media
from mmpeft.methods.attach import get_peft_model
from mmpeft.models.compiled import TESTED, layers_compiled, uncompilable
from mmpeft.models.positions import with_positions
from mmpeft.models.recomputed import RecomputedLayers
from mmpeft.models.tree_attention import tree_attention_on
from tests.families.qwen import QWEN
from tests.families.samples import picture, sample_of
from tests.models.test_tree_attention import llava_around
from tests.tiny import tiny_processor

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def batches(processor):
    shown = Media(images=[picture((24, 24))])
    for count in (3, 2, 5, 1, 4):
        made = [sample_of("<image>\nWhat? " + "x" * n * count, "a cat " * (n + 1), images=1) for n in range(count)]
        yield PackedCollator(processor)([encode_sample(processor, sample, shown) for sample in made])


def steps(model, processor):
    for batch in batches(processor):
        model.zero_grad()
        loss = model(**with_positions(model, batch), use_cache=False).loss
        loss.backward()
        yield loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def built(model_type):
    if model_type.removesuffix("_text") in QWEN:
        return QWEN[model_type.removesuffix("_text")]()
    processor = tiny_processor()
    return llava_around(model_type, processor), processor


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("model_type", sorted(TESTED))
def test_losses_and_gradients_are_the_same_and_no_row_compiles_anew(model_type):
    model, processor = built(model_type)
    adapted = get_peft_model(model, {"projector": "full", "language": {"r": 4, "lora_alpha": 8}}).train()
    torch._dynamo.reset()
    counters.clear()
    with tree_attention_on(adapted):
        plain = list(steps(adapted, processor))
        assert not counters["stats"]
        with layers_compiled(adapted) as layers:
            compiled = []
            for number, found in enumerate(steps(adapted, processor)):
                compiled.append(found)
                if number == 0:
                    after_one = dict(counters["stats"]), dict(counters["frames"])
            assert (dict(counters["stats"]), dict(counters["frames"])) == after_one, "compiled again"
            # As a micro-batch runs again that lacked memory.
            recomputed = RecomputedLayers(adapted)
            recomputed.recompute(len(recomputed.layers))
            again = list(steps(adapted, processor))
            recomputed.recompute(0)
    assert layers == len(model.get_decoder().layers)
    assert counters["stats"]["unique_graphs"] > 0
    for (loss, gradients), (found, theirs) in zip([*plain, *plain], [*compiled, *again], strict=True):
        assert found == pytest.approx(loss, rel=1e-5)
        scale = max(float(gradient.abs().max()) for gradient in gradients.values())
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)
    assert all(layer._compiled_call_impl is None for layer in model.get_decoder().layers)


def test_it_says_why_layers_cannot_be_compiled(monkeypatch):
    processor = tiny_processor()
    model = llava_around("llama", processor)
    assert "granite" not in TESTED
    assert uncompilable(llava_around("granite", processor), "cpu") == "layers of type 'granite' were not tested with it"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in uncompilable(model, "cpu")
    assert uncompilable(model, "cuda") is None
