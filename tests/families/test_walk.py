"""Every type in `AutoModelForImageTextToText` at tiny size, held to what mmpeft/families/walked.json says of it."""

import importlib.util

import pytest
import transformers

from mmpeft.core.errors import ModelError, RecipeError
from mmpeft.families import catalogue
from tests.families.shrink import MODEL_TYPES, tiny_model
from tests.families.walk import FIRST_CLASS, recorded, walk

TABLE = catalogue.walked()

QUICK = ("aria", "blip-2", "fuyu", "glm4v", "idefics2", "kosmos-2", "lfm2_vl", "mistral3", "pi0", "pix2struct")
"""A spread of shapes that every run of the tests walks; the others are slow in sum, not one by one."""

REFUSALS = {
    "diffusion_gemma": (ValueError, "gives no loss"),
    "evolla": (ValueError, "Unrecognized configuration class"),
    "llama4": (AttributeError, "has no attribute 'image_outputs'"),
    "pi0": (ModelError, r"PI0ForConditionalGeneration \(model type 'pi0'\) cannot be told"),
    "pp_formulanet": (RecipeError, "`get_input_embeddings` not auto"),
}
"""How the types fail that the table calls not supported; one that starts to work fails its test, and gets a step."""


def types(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("model_type", types(name for name in MODEL_TYPES if name not in REFUSALS))
def test_parts_training_and_the_plain_adapter(model_type, tmp_path):
    record = TABLE[model_type]
    assert "reason" not in record
    if "needs" in record and importlib.util.find_spec(record["needs"]) is None:
        with pytest.raises(ImportError, match=record["needs"]):
            tiny_model(model_type)
        pytest.skip(f"{record['needs']} is not installed")
    result = walk(model_type, tmp_path, **recorded(record))
    assert result.items() <= record.items()


@pytest.mark.parametrize("model_type", types(REFUSALS))
def test_a_type_that_is_not_supported_fails_as_the_table_says(model_type, tmp_path):
    assert TABLE[model_type]["reason"]
    assert "step" not in TABLE[model_type]
    error, message = REFUSALS[model_type]
    with pytest.raises(error, match=message):
        walk(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in TABLE if "exclude_modules" in TABLE[name]])
def test_modules_are_excluded_just_where_lora_on_them_would_be_lost(model_type, tmp_path):
    with pytest.raises(RecipeError, match="leave the modules out by `exclude_modules`"):
        walk(model_type, tmp_path)


def test_the_table_has_every_type_and_at_least_80_work():
    assert set(TABLE) == set(MODEL_TYPES)
    assert catalogue.walked_version() == transformers.__version__
    assert sum("step" in record and "needs" not in record for record in TABLE.values()) >= 80
    assert {name for name, record in TABLE.items() if "reason" in record} == set(REFUSALS)
    assert FIRST_CLASS & set(MODEL_TYPES) <= {name for name, record in TABLE.items() if "step" in record}
