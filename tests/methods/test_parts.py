import pytest

from mmpeft.methods.attach import get_peft_model
from mmpeft.methods.parts import whole_modules

TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"


@pytest.mark.parametrize(
    ("train", "whole"),
    [
        # PEFT trains a copy of each leaf, and keeps the original beside it.
        ({"projector": "full"}, [TOWER, f"{PROJECTOR}.linear_1", f"{PROJECTOR}.linear_2"]),
        ({"language": {"r": 2}}, [TOWER, PROJECTOR]),
        ({"language": "full"}, [TOWER, PROJECTOR]),
    ],
)
def test_what_is_no_language_model_and_does_not_train_stays_whole(llava, train, whole):
    names = {id(module): name for name, module in llava.named_modules()}
    model = get_peft_model(llava, train)
    assert [names[id(module)] for module in whole_modules(model)] == whole


def test_of_a_tower_that_trains_in_part_the_rest_stays_whole(llava):
    model = get_peft_model(llava, {"vision": {"r": 2, "target_modules": ["q_proj"]}})
    found = whole_modules(model)
    assert llava.model.vision_tower not in found
    assert llava.model.multi_modal_projector in found
    inside = {parameter for module in found for parameter in module.parameters()}
    assert not any(parameter.requires_grad for parameter in inside)
    assert inside
