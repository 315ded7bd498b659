import pytest

from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError


def recipe(cache):
    return Recipe.from_dict({"model": "m", "data": {"train": "t.json", "cache": cache}, "stages": "two-stage"})


def test_features_are_kept_where_it_pays_and_in_twenty_gibibytes():
    cache = recipe({}).data.cache
    assert (cache.features, cache.tokens, cache.directory, cache.limit_bytes) == ("auto", True, None, 20 << 30)


@pytest.mark.parametrize("features", ["auto", True, False])
def test_each_way_to_keep_features_is_taken_as_written(features):
    assert recipe({"features": features}).data.cache.features is features


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({"features": "always"}, "data.cache.features: found 'always'; expected 'auto'"),
        ({"limit_bytes": True}, "data.cache.limit_bytes: expected a number, found"),
        ({"limit_bytes": -5}, "data.cache.limit_bytes: found -5; input should be greater than or equal to 0"),
        ({"limit": 5}, "data.cache.limit: unknown key; did you mean 'limit_bytes'?"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_expected(cache, said):
    with pytest.raises(RecipeError) as caught:
        recipe(cache)
    assert said in str(caught.value)
