import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmpeft.core.errors import ModelError
from mmpeft.families import llava as llava_family
from mmpeft.families.generic import inspect_model, inspect_parts
from mmpeft.families.registry import family_of
from tests.families.shrink import tiny_model


def test_inspection_finds_the_parts_that_the_family_states(llava):
    spec = inspect_model(llava)
    assert {part: set(paths) for part, paths in spec.parts.items()} == {
        part: set(paths) for part, paths in llava_family.SPEC.parts.items()
    }


def test_it_is_told_how_each_part_was_found():
    assert inspect_parts(tiny_model("aria")).found == {
        "vision": "get_encoder",
        "projector": "name",
        "language": "get_decoder",
    }


def test_a_model_that_answers_no_text_is_refused_with_what_was_looked_for():
    model = CLIPVisionModel(CLIPVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ModelError, match=r"CLIPVisionModel .*get_output_embeddings\(\) no head that predicts tokens"):
        inspect_model(model)


def test_a_tower_inside_the_language_model_is_a_part_of_its_own():
    spec = inspect_model(tiny_model("git"))
    assert spec.part_of("git.encoder.layer.0.attention.self.query.weight") == "language"
    assert spec.part_of("git.image_encoder.vision_model.embeddings.class_embedding") == "vision"
    assert spec.part_of("git.visual_projection.visual_projection.0.weight") == "projector"


def test_the_encoder_of_a_model_that_reads_text_with_it_belongs_to_the_language_model():
    spec = inspect_model(tiny_model("t5gemma2"))
    assert spec.part_of("model.encoder.text_model.layers.0.mlp.up_proj.weight") == "language"
    assert spec.part_of("model.encoder.vision_tower.vision_model.post_layernorm.weight") == "vision"


def test_the_encoder_of_a_model_that_reads_pictures_alone_is_its_tower():
    assert inspect_model(tiny_model("pix2struct")).parts == {"vision": ("encoder",), "language": ("decoder",)}


def test_what_inspection_cannot_vouch_for_is_not_claimed():
    spec = family_of(tiny_model("aria"))
    assert not spec.supervised_logits
    assert spec.cacheable == ()
