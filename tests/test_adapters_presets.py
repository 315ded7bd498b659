"""Every preset under adapters/ loads with peft alone, fits its family, and trains exactly the parts it is named for."""

import json
import re

import peft
import pytest
import torch
from peft import PeftConfig

from mmpeft.core.assets import asset_directory
from mmpeft.families.registry import FAMILIES, family_of
from mmpeft.methods.plan import base_name
from mmpeft.models.compose import compose_model
from tests.families.models import FIRST_CLASS
from tests.models.parts import tiny_language, tiny_vision
from tests.tiny import tiny_image_processor, tiny_tokenizer

PRESETS = sorted(path.parent for path in asset_directory("adapters").glob("*/*/adapter_config.json"))
PARTS = {
    "projector": {"projector"},
    "lora": {"language"},
    "projector-lora": {"projector", "language"},
    "vision-lora": {"vision"},
    "audio-lora": {"audio"},
}


def tiny_composed():
    """Two encoders of unlike names, which the LLaVA class cannot hold."""
    tokenizer = tiny_tokenizer()
    model, _ = compose_model(
        vision=[tiny_vision("siglip"), tiny_vision("dinov2")],
        language=tiny_language("llama", tokenizer),
        projector="fusion_mlp",
        tokenizer=tokenizer,
        image_processor=[tiny_image_processor(), tiny_image_processor()],
    )
    return model


MODELS = {
    "composed": tiny_composed,
    **{name: lambda make=make: make()[0] for name, make in FIRST_CLASS.items()},
}

presets = pytest.mark.parametrize("preset", PRESETS, ids=lambda path: f"{path.parent.name}/{path.name}")


def test_each_family_has_presets_and_each_preset_a_family():
    names = {f"{path.parent.name}/{path.name}" for path in PRESETS}
    assert {"composed/lora", "composed/vision-lora"} <= names
    for family in FIRST_CLASS:
        tower = "audio-lora" if family == "qwen2_audio" else "vision-lora"
        assert {f"{family}/{name}" for name in ("projector", "lora", "projector-lora", tower)} <= names
    assert {path.parent.name for path in PRESETS} == {spec.name for spec in FAMILIES}


@presets
def test_it_is_a_plain_lora_that_names_no_base_model(preset):
    config = PeftConfig.from_pretrained(preset)
    assert config.peft_type == peft.PeftType.LORA
    assert config.base_model_name_or_path is None
    assert not config.inference_mode
    fields = json.loads((preset / "adapter_config.json").read_text())
    assert fields.items() <= (config.to_dict() | {"peft_type": "LORA"}).items()


@presets
def test_it_trains_exactly_its_parts_and_changes_no_logit(preset):
    model = MODELS[preset.parent.name]()
    tokens = torch.randint(0, 200, (1, 7))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        attached = peft.get_peft_model(model, PeftConfig.from_pretrained(preset))
        torch.testing.assert_close(attached(input_ids=tokens).logits, before, rtol=0, atol=0)
    spec = family_of(attached)
    trained = [name for name, parameter in attached.named_parameters() if parameter.requires_grad]
    assert {spec.part_of(base_name(name)) for name in trained} == PARTS[preset.name]


@presets
def test_lora_reaches_every_layer_and_saved_modules_are_the_projectors_leaves(preset):
    model = MODELS[preset.parent.name]()
    spec = family_of(model)
    leaves = set(spec.projector_leaves(model, spec))
    parts = PARTS[preset.name]
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and re.search(r"\.(layers?|blocks)\.\d+\.", name)  # not the heads of the language model and of SigLIP
        and spec.part_of(name) in parts - {"projector"}
    }
    attached = peft.get_peft_model(model, PeftConfig.from_pretrained(preset))
    names = [name for name, _ in attached.named_parameters()]
    assert {base_name(name.partition(".lora_A.")[0]) for name in names if ".lora_A." in name} == expected
    saved = {base_name(name.partition(".modules_to_save.")[0]) for name in names if ".modules_to_save." in name}
    assert saved == (leaves if "projector" in parts else set())
