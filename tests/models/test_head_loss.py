"""The head's loss in chunks is the one of all logits at once, which never stand in memory together."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from mmpeft.core.errors import ModelError
from mmpeft.models.head_loss import FINISHES, head_loss_on, unchunkable
from mmpeft.models.tree_attention import EXACT

VOCABULARY, WIDTH, LENGTH = 211, 32, 40
INSIDE = {name for name in EXACT if name.endswith(("_vl_text", "_omni_text"))}
"""Whose heads belong to the families that they come with: tests/families/test_head_loss.py."""

TYPES = sorted(EXACT - INSIDE | {"gemma2"})


def language(model_type):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if model_type == "phi3":
        sizes |= {"rope_scaling": None}
    if model_type in ("gemma2", "gemma3_text"):
        sizes |= {"final_logit_softcapping": 0.5}
    if model_type == "granite":
        sizes |= {"logits_scaling": 3.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(5)
    return model


def batch(length=LENGTH, rows=2):
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :15] = -100
    labels[1, 30:] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(model, inputs, **options):
    loss, expected = gradients(model, inputs)
    with head_loss_on(model, chunked=True, chunk_entries=7 * VOCABULARY, **options) as figures:
        found, chunked = gradients(model, inputs)
    assert figures.chunked > figures.largest // VOCABULARY == 7
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
    assert chunked.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("model_type", TYPES)
def test_loss_and_gradients_are_those_of_all_logits_at_once(model_type):
    model = language(model_type)
    same(model, batch())
    same(model, {**batch(), "num_items_in_batch": 97})
    same(model, {**batch(), "num_items_in_batch": torch.tensor(97)})


@pytest.mark.parametrize(
    "head",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_a_head_that_is_frozen_adapted_or_trained(head):
    model = get_peft_model(language("llama"), LoraConfig(r=2, **head))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    same(model.eval(), batch())


def test_a_head_tied_to_trained_embeddings():
    model = language("llama")
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    same(model, batch())


class Counting(TorchDispatchMode):
    """The most numbers of a tensor that any operation gave, and the multiplications of matrix products."""

    def __init__(self):
        super().__init__()
        self.numbers = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        if function is torch.ops.aten.mm.default:
            self.products += out.numel() * args[0].shape[1]
        return out


@pytest.mark.parametrize("chunked", [True, None])
def test_no_tensor_holds_positions_times_vocabulary_and_no_product_is_computed_twice(chunked):
    model, inputs = language("llama"), batch(length=96)
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    positions = inputs["labels"].numel()
    counted = []
    for switch in (False, chunked):
        with head_loss_on(model, chunked=switch, auto_entries=10_000, chunk_entries=10_000), Counting() as seen:
            model(**inputs).loss.backward()
        counted.append(seen)
    plain, spared = counted
    assert plain.numbers == positions * VOCABULARY
    assert spared.numbers <= positions * 64, "more than the width of the layers"
    assert spared.products == plain.products


def test_auto_leaves_few_positions_to_the_model():
    model, inputs = language("llama"), batch()
    with head_loss_on(model) as figures:
        out = model(**inputs)
    assert out.logits.shape == (2, LENGTH, VOCABULARY)
    assert (figures.positions, figures.kept, figures.chunked) == (80, 80, 0)


def test_forwards_without_labels_and_after_it_are_as_ever():
    model, inputs = language("llama"), batch()
    plain = model(**inputs)
    with head_loss_on(model, chunked=True), torch.no_grad():
        loss = model(**inputs).loss
        torch.testing.assert_close(model(input_ids=inputs["input_ids"]).logits, plain.logits)
    torch.testing.assert_close(loss, plain.loss)
    torch.testing.assert_close(model(**inputs).logits, plain.logits)


def test_half_precision_under_autocast_stays_within_its_noise():
    model, inputs = language("llama"), batch()
    losses = []
    for chunked in (False, True):
        with head_loss_on(model, chunked=chunked, chunk_entries=7 * VOCABULARY):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def test_a_model_whose_logits_nobody_has_looked_at_is_refused_by_name_and_left_alone_by_auto():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=VOCABULARY)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert "GPT2LMHeadModel" not in FINISHES
    with pytest.raises(ModelError, match="what GPT2LMHeadModel does to its logits was not tested"):
        head_loss_on(model, chunked=True).__enter__()
    inputs = batch()
    with head_loss_on(model, auto_entries=0) as figures:
        assert model(**inputs).logits.shape == (2, LENGTH, VOCABULARY)
    assert figures.chunked == 0
    assert unchunkable(language("llama")) is None
