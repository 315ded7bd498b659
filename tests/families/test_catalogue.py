import subprocess
import sys

from transformers import CLIPProcessor, LlavaProcessor, PixtralProcessor, Qwen2_5OmniProcessor, VideoLlama3Processor

from mmpeft.families.catalogue import catalogue, takes_supervised_logits
from mmpeft.families.registry import FAMILIES


def entries():
    return {entry.model_type: entry for entry in catalogue()}


def test_first_class_types_carry_the_facts_of_their_family():
    for spec in FAMILIES:
        for model_type in spec.model_types:
            entry = entries()[model_type]
            assert (entry.status, entry.family, entry.note) == ("first class", spec.name, spec.note)
            assert dict(entry.parts) == dict(spec.parts)
            assert set(entry.found.values()) == {"stated"}


def test_every_other_type_was_tested_or_has_its_reason():
    for entry in catalogue():
        if entry.status == "generic":
            assert entry.step in ("picture", "text")
            assert entry.parts["language"]
            assert entry.found.keys() == entry.parts.keys()
        elif entry.status == "not supported":
            assert entry.step is None
            assert entry.note


def test_a_missing_projector_and_modules_to_leave_out_are_said():
    assert entries()["mllama"].note == ""
    assert entries()["chameleon"].note == "No projector: train LoRA on the language model."
    assert entries()["mistral4"].note == "No projector: train LoRA on the language model. It takes no pictures."
    assert entries()["inkling2"].note.startswith("Give language.exclude_modules: [weight_proj]")


def test_types_whose_batches_mmpeft_cannot_make_say_so():
    generic = [entry for entry in catalogue() if entry.status == "generic"]
    without = {entry.model_type for entry in generic if entry.data is False}
    # Encoder and decoder; a processor that does not say what it writes.
    assert {"florence2", "idefics2"} <= without
    assert {entry.model_type for entry in generic if "batches of your own" in entry.note} == without
    assert all(entries()[name].data for name in ("mistral3", "glm4v", "aya_vision", "vipllava", "qwen3_vl_moe"))
    assert "depends on the processor" in entries()["cosmos3_omni"].note


def test_logits_of_supervised_positions_alone_where_every_type_of_a_processor_takes_them():
    assert takes_supervised_logits(object.__new__(PixtralProcessor))
    assert takes_supervised_logits(object.__new__(LlavaProcessor))
    # Of a family that states that it does not; of a type that was seen not to; of no type at all.
    assert not takes_supervised_logits(object.__new__(Qwen2_5OmniProcessor))
    assert not takes_supervised_logits(object.__new__(VideoLlama3Processor))
    assert not takes_supervised_logits(object.__new__(CLIPProcessor))


def test_it_costs_neither_peft_nor_a_model_of_transformers():
    code = (
        "import sys, mmpeft.families.catalogue as c; c.catalogue(); "
        "print([m for m in ('peft', 'transformers.modeling_utils') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
