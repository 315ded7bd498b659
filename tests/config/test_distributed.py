import pytest

from mmpeft.config.distributed import DistributedConfig
from mmpeft.config.recipe import Recipe
from mmpeft.core.errors import RecipeError

STAGE = {"name": "one", "train": {"projector": "full"}}


def stage(**keys):
    recipe = {"model": "m", "data": {"train": "t"}, "stages": [STAGE | keys]}
    return Recipe.from_dict(recipe).stages[0].distributed


def test_a_name_is_short_for_a_block_and_nothing_means_auto():
    assert stage() == DistributedConfig(strategy="auto", offload="none")
    assert stage(distributed="zero2") == stage(distributed={"strategy": "zero2"})
    assert stage(distributed={"strategy": "zero3", "offload": "all"}).offload == "all"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("zero4", "unknown strategy 'zero4'; did you mean"),
        ("fsdp", "did you mean 'fsdp2'?"),
        ({"strategy": "ddp", "offload": "optimizer"}, "'optimizer' is for zero1, zero2, zero3; this stage has ddp"),
        ({"strategy": "zero2", "offload": "all"}, "'all' is for zero3, fsdp2; this stage has zero2"),
        ({"strategy": "zero2", "offloading": "all"}, "unknown key; did you mean 'offload'?"),
        ({"strategy": "zero2", "tensor_parallel": 2}, "tensor_parallel: is for ddp; this stage has zero2"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"strategy": "zero3", "context_parallel": 2}, "context_parallel: is for ddp and fsdp2; this stage has zero3"),
        ({"context_parallel": 2, "tensor_parallel": 2}, "context_parallel: and tensor_parallel exclude each other"),
        (3, "distributed"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_what_can(value, said):
    with pytest.raises(RecipeError, match="stages") as caught:
        stage(distributed=value)
    assert said in str(caught.value)


def test_the_launchers_words_have_their_place_in_the_recipe():
    with pytest.raises(RecipeError, match=r"trainer.deepspeed: is set elsewhere in the recipe: stages\[\].distributed"):
        stage(trainer={"deepspeed": "zero.json"})
