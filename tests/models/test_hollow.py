"""A step on tensors without storage takes what the same step takes for real."""

import pytest
import torch

from mmpeft import get_peft_model
from mmpeft.models.hollow import Hollow, HollowTensor, hollow_model, hollow_tensor
from tests.tiny import tiny_llava, tiny_processor

CPU = torch.device("cpu")
TRAINS = {
    "projector": {"projector": "full"},
    "lora": {"projector": "full", "language": {"r": 4}},
    "tower": {"vision": "full"},
}


def batch(processor, rows=2, columns=24):
    ids = torch.full((rows, columns), 5)
    ids[:, 3:7] = processor.image_token_id
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "pixel_values": torch.rand(rows, 3, 16, 16),
    }


def step(model, inputs, hollow):
    model.train()
    with hollow:
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        del loss
    return hollow


@pytest.mark.parametrize("train", TRAINS.values(), ids=TRAINS)
def test_a_hollow_step_takes_what_a_real_one_takes(train):
    processor = tiny_processor()
    real = Hollow(CPU)
    model = get_peft_model(tiny_llava(processor), train)
    for tensor in (*model.parameters(), *model.buffers()):
        real.hold(tensor, "weights")
    step(model, batch(processor), real)
    hollow = Hollow(CPU)
    with torch.device("meta"):
        bare = tiny_llava(processor)
    bare = get_peft_model(bare, train)
    hollow_model(bare, hollow)
    inputs = {key: hollow_tensor(value, hollow) for key, value in batch(processor).items()}
    step(bare, inputs, hollow)
    assert hollow.live["weights"] == real.live["weights"]
    assert hollow.flop == real.flop > 1e5
    assert hollow.peak.bytes == pytest.approx(real.peak.bytes, rel=0.02)
    assert hollow.peak.bytes > 1.3 * hollow.live["weights"]


def test_what_is_let_go_is_no_longer_counted():
    hollow = Hollow(CPU)
    left = HollowTensor(torch.empty(256, 256, device="meta"), CPU)
    with hollow:
        right = left @ left
        assert hollow.live["activations"] == 256 * 256 * 4
        view = right.view(-1)
        del right
        assert hollow.live["activations"] == 256 * 256 * 4
        del view
    assert hollow.live["activations"] == 0
    assert hollow.peak.bytes == 256 * 256 * 4
    assert hollow.flop == 2 * 256**3


def test_what_is_as_wide_as_the_vocabulary_is_logits():
    hollow = Hollow(CPU, vocabulary=96)
    states = HollowTensor(torch.empty(8, 32, device="meta"), CPU)
    head = HollowTensor(torch.empty(96, 32, device="meta"), CPU)
    hollow.hold(head, "weights")
    with hollow:
        logits = torch.nn.functional.linear(states, head)
        assert hollow.live["logits"] == logits.nbytes == 8 * 96 * 4


def test_truths_choose_places_of_a_hollow_tensor():
    hollow = Hollow(CPU)
    with hollow:
        states = HollowTensor(torch.empty(4, 8, device="meta"), CPU)
        chosen = states[torch.tensor([True, False, True, True])]
        states[torch.tensor([True, False, False, False])] = 0.0
    assert chosen.shape == (3, 8)
    assert states.shape == (4, 8)
