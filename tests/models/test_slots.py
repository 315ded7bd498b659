import pytest
import torch

from mmpeft.models.slots import Seen, Slots

HEADS, CHANNELS = 2, 4


def states(tokens, rows=1):
    """Keys that say which token they are of; values are their negatives."""
    keys = torch.as_tensor(tokens, dtype=torch.float32).view(rows, 1, -1, 1).expand(rows, HEADS, -1, CHANNELS)
    return keys, -keys


def forward(slots, *tokens, rows=1):
    found = [slots.cache.update(*states(tokens, rows), layer) for layer in range(2)]
    return [[row[0, 0, :, 0].tolist() for row in (keys, values)] for keys, values in found]


def held(slots):
    """The tokens of each slot, which are the same in each layer, head and channel."""
    cut = []
    for layer in slots.cache.layers:
        keys, values = layer.kept
        assert torch.equal(keys, -values)
        assert (keys == keys[:, :1, :, :1]).all()
        cut.append([keys[slot, 0, :length, 0].tolist() for slot, length in enumerate(slots.lengths)])
    assert cut[0] == cut[1]
    return cut[0]


@pytest.fixture
def filled():
    """Two prompts on 1 2, and one of its own."""
    slots = Slots(layers=2, count=4)
    slots.fill(torch.tensor([[0, 1, 2, 3], [0, 1, 4, 0], [5, 0, 0, 0]]), [4, 3, 1])
    row = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert forward(slots, *row) == [[row, [-token for token in row]]] * 2
    return slots


def test_prompts_are_picked_out_of_their_row(filled):
    assert held(filled) == [[1, 2, 3, 4], [1, 2, 5], [6]]


def test_a_step_appends_a_token_to_each_slot(filled):
    seen = filled.advance()
    assert seen.lengths == (5, 4, 2)
    forward(filled, 7, 8, 9, rows=3)
    assert held(filled) == [[1, 2, 3, 4, 7], [1, 2, 5, 8], [6, 9]]


def test_the_last_slots_take_the_places_of_those_that_ended_and_new_ones_follow(filled):
    assert filled.drop([0]) == [2, 1]
    assert held(filled) == [[6], [1, 2, 5]]
    filled.fill(torch.tensor([[0, 1]]), [2])
    forward(filled, 10, 11)
    filled.advance()
    forward(filled, 7, 8, 9, rows=3)
    assert held(filled) == [[6, 7], [1, 2, 5, 8], [10, 11, 9]]
    assert filled.drop([1, 2]) == [0]
    assert held(filled) == [[6, 7]]
    assert filled.drop([0]) == []


def test_slots_grow(filled):
    for token in range(100):
        filled.advance()
        forward(filled, token, token, token, rows=3)
    assert held(filled) == [[1, 2, 3, 4, *range(100)], [1, 2, 5, *range(100)], [6, *range(100)]]


def test_what_a_token_sees():
    mask = Seen([4, 2]).mask(None, torch.device("cpu"))
    assert mask.shape == (2, 1, 1, 4)
    assert mask.flatten(1).int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert Seen([4, 2]).mask(3, torch.device("cpu")).flatten(1).int().tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert Seen([3, 3]).mask(None, torch.device("cpu")) is None
    assert Seen([3, 3]).mask(3, torch.device("cpu")) is None
    assert Seen([3, 3]).mask(2, torch.device("cpu")).flatten(1).int().tolist() == [[0, 1, 1]] * 2
