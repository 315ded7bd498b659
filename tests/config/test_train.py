import pytest

from mmpeft.config.train import check_train, train_problems
from mmpeft.core.errors import RecipeError


@pytest.mark.parametrize(
    ("fields", "key", "message"),
    [
        ({"r": 0}, "r", "found 0; expected a whole number of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha", "found 0; expected a number above 0"),
        ({"lora_alpha": "x"}, "lora_alpha", "found 'x'; expected a number above 0"),
        ({"lora_dropout": 1.5}, "lora_dropout", "found 1.5; expected a number from 0 to below 1"),
        ({"bias": "some"}, "bias", "found 'some'; expected 'none', 'all' or 'lora_only'"),
        ({"target_modules": 3}, "target_modules", "found 3; expected a list of names or a regular expression"),
        ({"r": 3, "init_lora_weights": "orthogonal"}, "r", "needs an even rank"),
        ({"init_lora_weights": "PiSSA"}, "init_lora_weights", "did you mean 'pissa'"),
        ({"kasa_config": {}}, "kasa_config", "answers change before training"),
        ({"layer_replication": [[0, 2]]}, "layer_replication", "answers change before training"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens", "it does nothing"),
    ],
)
def test_a_value_that_would_fail_later_or_train_nothing_is_named(fields, key, message):
    ((found, said),) = train_problems({"language": fields})
    assert found == f"language.{key}"
    assert message in said


def test_every_problem_of_a_block_is_told_at_once():
    with pytest.raises(RecipeError, match=r"3 problem\(s\)") as caught:
        check_train({"language": {"lora_alpha": 0, "lora_dropout": 2, "use_dorra": True}})
    assert all(key in str(caught.value) for key in ("lora_alpha", "lora_dropout", "did you mean 'use_dora'"))
