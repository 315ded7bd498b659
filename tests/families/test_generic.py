import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from mmpeft.core.errors import ModelError
from mmpeft.families import llava as llava_family
from mmpeft.families.generic import inspect_model


def test_inspection_finds_the_parts_that_the_family_states(llava):
    spec = inspect_model(llava)
    assert {part: set(paths) for part, paths in spec.parts.items()} == {
        part: set(paths) for part, paths in llava_family.SPEC.parts.items()
    }


def test_a_model_without_an_image_tower_is_refused_with_what_was_found():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11))
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel .*expected an image tower"):
        inspect_model(model)
