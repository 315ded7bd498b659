import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.errors import RecipeError
from mmpeft.families.registry import family_of
from mmpeft.methods.lora import lora_config, names_to_regex, target_names


def test_default_targets_are_the_parts_linear_layers_and_nothing_else(llava):
    spec = family_of(llava)
    names = target_names(llava, spec, "language", {"r": 4})
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)


def test_a_list_stays_inside_its_part(llava):
    """`q_proj` exists in the vision tower too: a user who tunes the language model must not hit it."""
    spec = family_of(llava)
    names = target_names(llava, spec, "language", {"target_modules": ["q_proj"]})
    assert names == [f"model.language_model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


def test_a_pattern_is_matched_inside_the_part(llava):
    spec = family_of(llava)
    names = target_names(llava, spec, "vision", {"target_modules": r"encoder\.layers\.0\..*fc\d"})
    assert {name.rpartition(".")[2] for name in names} == {"fc1", "fc2"}


def test_exclude_modules(llava):
    spec = family_of(llava)
    names = target_names(llava, spec, "language", {"exclude_modules": ["q_proj", "down_proj"]})
    assert len(names) == 2 * 5


def test_an_exclusion_that_excludes_nothing_is_an_error(llava):
    spec = family_of(llava)
    with pytest.raises(RecipeError, match=r"exclude_modules: 'qproj' excludes no module .*; did you mean 'q_proj'\?"):
        target_names(llava, spec, "language", {"exclude_modules": ["down_proj", "qproj"]})
    with pytest.raises(RecipeError, match=r"exclude_modules: 'nothing' excludes no module of the language part"):
        target_names(llava, spec, "language", {"exclude_modules": "nothing"})


def test_layers_by_number(llava):
    spec = family_of(llava)
    names = target_names(llava, spec, "language", {"target_modules": ["q_proj"], "layers_to_transform": [1]})
    assert names == ["model.language_model.layers.1.self_attn.q_proj"]
    named = {"layers_to_transform": 0, "layers_pattern": "layers"}
    assert all(".layers.0." in name for name in target_names(llava, spec, "vision", named))
    with pytest.raises(RecipeError, match=r"no chosen module lies in layer 9; there are layers 0, 1"):
        target_names(llava, spec, "language", {"layers_to_transform": [0, 9]})
    with pytest.raises(RecipeError, match=r"layers_pattern: it needs layers_to_transform beside it"):
        target_names(llava, spec, "language", {"layers_pattern": "layers"})


def test_a_pattern_without_a_match_says_what_it_is_held_against(llava):
    with pytest.raises(RecipeError, match=r"whole name inside the part, such as 'layers.0.self_attn.q_proj'"):
        target_names(llava, family_of(llava), "language", {"target_modules": r"model\.language_model.*q_proj"})


def test_no_match_names_the_modules_that_exist(llava):
    spec = family_of(llava)
    with pytest.raises(RecipeError, match=r"ends in 'qproj'; did you mean 'q_proj'\? \(it has: down_proj, "):
        target_names(llava, spec, "language", {"target_modules": ["qproj"]})
    with pytest.raises(RecipeError, match=r"train.language: not one module matched target_modules='nothing'"):
        target_names(llava, spec, "language", {"target_modules": "nothing"})
    with pytest.raises(RecipeError, match="is not a regular expression"):
        target_names(llava, spec, "language", {"target_modules": "("})


def test_parts_of_other_rank_become_patterns(llava):
    config = lora_config(
        llava,
        family_of(llava),
        {"vision": {"r": 2, "lora_alpha": 4}, "language": {"r": 8, "lora_alpha": 4}},
        saved=[],
    )
    assert (config.r, config.lora_alpha) == (2, 4)
    assert list(config.rank_pattern.values()) == [8]
    assert not config.alpha_pattern


def test_fields_that_one_adapter_cannot_hold_twice_are_refused(llava):
    train = {"vision": {"r": 2, "lora_dropout": 0.1}, "language": {"r": 2, "lora_dropout": 0.2}}
    with pytest.raises(RecipeError, match=r"train.language.lora_dropout: 0.2 differs from 0.1 of train.vision"):
        lora_config(llava, family_of(llava), train, saved=[])
    with pytest.raises(RecipeError, match=r"give use_dora = True here too"):
        lora_config(llava, family_of(llava), {"vision": {"use_dora": True}, "language": {"r": 2}}, saved=[])


WORDS = st.sampled_from(["model", "h", "layers", "attn", "mlp", "q", "k", "up+down", "c_attn"])
NAMES = st.lists(WORDS | st.integers(0, 12).map(str), min_size=1, max_size=5).map(".".join)


@given(st.sets(NAMES, min_size=1, max_size=30), st.data())
def test_the_pattern_matches_exactly_the_names_it_was_made_from(names, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(names)), min_size=1))
    pattern = re.compile(names_to_regex(chosen))
    assert {name for name in names if pattern.fullmatch(name)} == chosen
