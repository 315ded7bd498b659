"""A merged model answers as its adapter does, and is the base wherever the adapter changes nothing."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmpeft import get_peft_model, save_adapter
from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.export.merge import MergedModel, merged_tensors
from mmpeft.export.shards import Checkpoint, write_shards
from mmpeft.methods.checkpoint import initial_lora
from mmpeft.models.load import auto_class, load_model
from tests.families.inputs import inputs_of
from tests.families.models import MODELS
from tests.families.shrink import tiny_model
from tests.families.test_adapters import LORA, built, scattered
from tests.methods.test_attach import ADAPTERS, ask
from tests.methods.test_checkpoint import load, shake
from tests.tiny import tiny_llava

EXPERTS = {"language": {"r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}}
BOTH = {"projector": "full", "language": {"r": 2}}


@pytest.fixture
def base(tmp_path, processor):
    folder = tmp_path / "base"
    tiny_llava(processor).save_pretrained(folder, max_shard_size="50KB")
    return folder


def trained(base, train, path):
    """A trained adapter, and the model that has it."""
    model = get_peft_model(load(base), train)
    initial = initial_lora(model)
    shake(model)
    save_adapter(model, path, initial=initial)
    return model


def write(merged, base, out):
    """A model's directory of a merged stream."""
    out.mkdir()
    write_shards(merged, out, max_bytes=40_000)
    for file in base.glob("*.json"):
        if "index" not in file.name:
            shutil.copy(file, out)
    return out


@pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias")
@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_logits_are_the_adapters(name, base, processor, tmp_path):
    batch = ask(processor)
    model = trained(base, ADAPTERS[name], tmp_path / "adapter")
    want = model(**batch).logits
    assert (want - load(base)(**batch).logits).abs().max() > 0.01
    merged = MergedModel(base, tmp_path / "adapter")
    out = write(merged, base, tmp_path / "merged")
    torch.testing.assert_close(load(out)(**batch).logits, want, atol=1e-5, rtol=0)
    before, after = dict(Checkpoint(base)), dict(Checkpoint(out))
    differ = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys()
    assert differ == merged.changed
    assert not merged.untied


@torch.no_grad()
def test_a_base_in_bfloat16_is_merged_in_float32_and_rounded_once(base, tmp_path):
    half = tmp_path / "half"
    load(base).to(torch.bfloat16).save_pretrained(half)
    trained(base, {**BOTH, "vision": {"r": 2}}, tmp_path / "adapter")
    model = AutoModelForImageTextToText.from_pretrained(half, dtype=torch.float32)
    model.save_pretrained(tmp_path / "exact")
    want = dict(merged_tensors(tmp_path / "exact", tmp_path / "adapter"))
    found = dict(merged_tensors(half, tmp_path / "adapter"))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], want[name].to(torch.bfloat16)) for name in want)


@pytest.mark.parametrize(
    ("model_type", "train"),
    [
        # One parameter a layer on disk; a parameter that lies transposed; one tensor an expert on disk.
        ("qwen3_vl_moe", EXPERTS),
        ("aria", EXPERTS),
        ("qwen3_5_moe", EXPERTS),
        ("dots3_note", EXPERTS),
        ("glm4v_moe", EXPERTS),
        # Its LoRA is stored under other names than its modules have.
        ("deepseek_ocr2", BOTH),
        ("qwen2_5_vl", {**BOTH, "vision": {"r": 2}}),
        # Its audio tower clamps by buffers of one number, which may be infinite.
        ("gemma4", {"language": {"r": 2}}),
        ("gemma3", {"projector": "full", "language": {"r": 2, "use_dora": True}}),
        ("llava", {"language": {"r": 2, "bias": "all"}}),
        ("llava", {"projector": "full", "vision": {"r": 2, "bias": "all"}}),
        ("llava", {"vision": {"r": 2, "bias": "lora_only"}}),
        ("llava", {"language": {"r": 2, "target_modules": ["q_proj", "lm_head"]}}),
        ("llava", {"language": {"r": 2, "trainable_token_indices": [1, 2, 3]}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@torch.no_grad()
def test_models_of_other_types(model_type, train, tmp_path):
    model = tiny_model(model_type)
    batch = inputs_of(model).batch
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    before = model(**batch).logits
    adapted = shake(get_peft_model(model, train))
    want = adapted(**batch).logits
    assert (want - before).abs().max() > 0.01
    save_adapter(adapted, tmp_path / "adapter")
    out = write(merged_tensors(tmp_path / "base", tmp_path / "adapter"), tmp_path / "base", tmp_path / "merged")
    again, report = auto_class(model.config, "").from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(again.eval()(**batch).logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_every_first_class_family(family, tmp_path):
    model, batch = built(family)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapted = scattered(get_peft_model(model, {"projector": "full", **LORA})).eval()
    want = adapted(**batch).logits
    save_adapter(adapted, tmp_path / "adapter")
    out = write(merged_tensors(tmp_path / "base", tmp_path / "adapter"), tmp_path / "base", tmp_path / "merged")
    again, report = auto_class(model.config, "").from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    torch.testing.assert_close(again.eval()(**batch).logits, want, atol=1e-5, rtol=1e-5)


def test_an_adapter_stored_under_other_names_loads(tmp_path):
    model = tiny_model("deepseek_ocr2")
    model.save_pretrained(tmp_path / "base")
    adapted = shake(get_peft_model(model, BOTH))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    save_adapter(adapted, tmp_path / "adapter")
    (tmp_path / "base" / "none").mkdir()
    with pytest.raises(ModelError, match="processor"):  # The weights fit; this tiny base has no processor.
        load_model(tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("train", "untied"),
    [
        ({"r": 2, "target_modules": ["q_proj", "lm_head"]}, True),
        ({"r": 2, "trainable_token_indices": [1, 2, 3]}, False),
    ],
    ids=["head", "tokens"],
)
@torch.no_grad()
def test_tied_embeddings_stay_tied_unless_the_adapter_tells_them_apart(train, untied, base, processor, tmp_path):
    batch = ask(processor)
    model = trained(base, {"language": train}, tmp_path / "adapter")
    want = model(**batch).logits
    merged = MergedModel(base, tmp_path / "adapter")
    assert merged.untied is untied
    out = write(merged, base, tmp_path / "merged")
    assert ("lm_head.weight" in {name.rpartition("language_model.")[2] for name in Checkpoint(out).tensors}) is untied
    if untied:
        config = json.loads((out / "config.json").read_text())
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        (out / "config.json").write_text(json.dumps(config))
    torch.testing.assert_close(load(out)(**batch).logits, want, atol=1e-5, rtol=0)


def test_without_an_adapter_the_base_passes_by_bit_by_bit(base):
    found = dict(merged_tensors(base, None))
    assert all(torch.equal(tensor, found[name]) for name, tensor in Checkpoint(base))


def test_an_adapter_of_another_base_is_refused_by_shapes(base, processor, tmp_path):
    trained(base, BOTH, tmp_path / "adapter")
    other = tiny_llava(processor)
    other.config.text_config.hidden_size = 64
    type(other)(other.config).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="does not fit LlavaForConditionalGeneration"):
        merged_tensors(tmp_path / "other", tmp_path / "adapter")


def test_an_adapter_of_another_base_is_refused_by_names(base, processor, tmp_path):
    trained(base, {"language": {"r": 2}}, tmp_path / "adapter")
    config = tiny_llava(processor).config
    config.text_config.num_hidden_layers = 1
    type(tiny_llava(processor))(config).save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="have no place in the model"):
        merged_tensors(tmp_path / "other", tmp_path / "adapter")


def test_an_adapter_of_another_base_is_refused_by_the_layout_it_recorded(base, tmp_path):
    trained(base, BOTH, tmp_path / "adapter")
    facts = tmp_path / "adapter" / "mmpeft.json"
    facts.write_text(json.dumps({"base_layout": Checkpoint(base).layout_hash()}))
    assert dict(merged_tensors(base, tmp_path / "adapter"))
    facts.write_text('{"base_layout": "of another"}')
    with pytest.raises(AdapterError, match="trained on another base: the names and shapes"):
        merged_tensors(base, tmp_path / "adapter")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(bad, base, tmp_path):
    trained(base, BOTH, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    good = load_file(file)
    for name in [name for name in good if "lora_B" in name or "linear_1" in name][:2]:
        state = {key: tensor.clone() for key, tensor in good.items()}
        state[name].view(-1)[3] = bad
        save_file(state, file, metadata={"format": "pt"})
        module = name.removeprefix("base_model.model.").rpartition(".weight")[0].split(".lora_")[0]
        with pytest.raises(AdapterError, match=rf"{module}\..*NaN or infinite; train or copy it again"):
            merged_tensors(base, tmp_path / "adapter")
    save_file(good, file, metadata={"format": "pt"})
    shard = sorted(base.glob("*.safetensors"))[0]
    state = load_file(shard)
    name = min(state)
    state[name].view(-1)[0] = bad
    save_file(state, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} has weights that are NaN or infinite"):
        dict(merged_tensors(base, tmp_path / "adapter"))


def test_what_gets_too_large_for_the_precision_is_refused_by_name(base, tmp_path):
    half = tmp_path / "half"
    load(base).to(torch.float16).save_pretrained(half)
    trained(base, {"projector": "full"}, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    state[min(state)][:] = 1e6
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"linear_1.bias: weights are NaN or infinite \(in float16\)"):
        dict(merged_tensors(half, tmp_path / "adapter"))


def test_a_quantized_base_is_refused(base, tmp_path):
    trained(base, BOTH, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantized \(fp8\).*merge it into the model that was quantized"):
        merged_tensors(base, tmp_path / "adapter")


def test_a_configuration_of_another_model_is_refused(base, tmp_path):
    trained(base, BOTH, tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 96
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has shape \(.*config.json says"):
        merged_tensors(base, tmp_path / "adapter")
