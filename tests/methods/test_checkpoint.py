import json
import os

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmpeft import get_peft_model, save_adapter
from mmpeft.core.errors import AdapterError, OutputError
from mmpeft.methods.checkpoint import carry_over, initial_lora, read_weights, save_model
from tests.methods.test_attach import ADAPTERS, ask
from tests.tiny import tiny_llava


@pytest.fixture
def base(tmp_path, processor):
    folder = tmp_path / "base"
    tiny_llava(processor).save_pretrained(folder)
    return folder


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def shake(model, seed=1):
    """Stands for training: every trainable weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# peft 0.21 takes the bias of lora_B, one-dimensional by nature, for a tensor that ZeRO-3 left ungathered.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias")
@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_an_adapter_gives_the_same_logits_by_every_way_of_loading_it(name, base, processor, tmp_path):
    batch = ask(processor)
    model = get_peft_model(load(base), ADAPTERS[name])
    initial = initial_lora(model)
    shake(model)
    want = model(**batch).logits
    plain = load(base)(**batch).logits
    assert (want - plain).abs().max() > 0.01
    path = save_adapter(model, tmp_path / "adapter", processor=processor, initial=initial)
    torch.testing.assert_close(model(**batch).logits, want, atol=0, rtol=0)
    by_peft = PeftModel.from_pretrained(load(base), path).eval()
    # PiSSA and OLoRA are re-expressed over the untouched base: equal to rounding.
    tolerance = 1e-5 if initial else 1e-6
    torch.testing.assert_close(by_peft(**batch).logits, want, atol=tolerance, rtol=0)
    torch.testing.assert_close(load(path)(**batch).logits, want, atol=tolerance, rtol=0)
    torch.testing.assert_close(by_peft.merge_and_unload()(**batch).logits, want, atol=1e-5, rtol=0)


def test_what_is_written_is_plain_peft_with_the_processor(base, processor, tmp_path):
    model = shake(get_peft_model(load(base), ADAPTERS["both"]))
    path = save_adapter(model, tmp_path / "adapter", processor=processor, facts={"a": 1}, card="# card\n")
    config = PeftConfig.from_pretrained(path)
    assert config.base_model_name_or_path == str(base.resolve())
    assert config.modules_to_save == [
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    ]
    assert AutoProcessor.from_pretrained(path).image_token == processor.image_token
    assert json.loads((path / "mmpeft.json").read_text()) == {"a": 1}
    assert (path / "README.md").read_text() == "# card\n"
    weights = load_file(path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in weights.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert not [name for name in os.listdir(path) if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_second_stage_carries_the_first_ones_projector_over(base, processor, tmp_path):
    batch = ask(processor)
    first = shake(get_peft_model(load(base), {"projector": "full"}))
    with torch.no_grad():
        want = first(**batch).logits
    path = save_adapter(first, tmp_path / "one")
    second = get_peft_model(load(base), ADAPTERS["both"]).eval()
    carry_over(second, path)
    with torch.no_grad():
        torch.testing.assert_close(second(**batch).logits, want, atol=0, rtol=0)


def test_what_the_next_stage_has_no_place_for_is_an_error_not_lost(base, tmp_path):
    path = save_adapter(get_peft_model(load(base), {"projector": "full"}), tmp_path / "one")
    with pytest.raises(AdapterError, match=r"4 of its 4 tensors have no place in the next stage"):
        carry_over(get_peft_model(load(base), {"language": {"r": 4}}), path)


def test_another_rank_is_an_error(base, tmp_path):
    path = save_adapter(get_peft_model(load(base), {"language": {"r": 4}}), tmp_path / "one")
    with pytest.raises(AdapterError, match=r"has shape \(4, \d+\), the next stage expects \(8, \d+\); give both"):
        carry_over(get_peft_model(load(base), {"language": {"r": 8}}), path)


def test_a_file_cut_short_is_named(base, tmp_path):
    path = save_adapter(get_peft_model(load(base), {"projector": "full"}), tmp_path / "one")
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="not a whole safetensors file"):
        read_weights(path)
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors there"):
        read_weights(tmp_path)


def test_a_failed_save_leaves_the_old_adapter(base, tmp_path, monkeypatch):
    model = get_peft_model(load(base), {"projector": "full"})
    path = save_adapter(model, tmp_path / "one", facts={"which": "old"})

    class Full:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="the disk is full"):
        save_adapter(model, path, processor=Full(), facts={"which": "new"})
    assert json.loads((path / "mmpeft.json").read_text()) == {"which": "old"}
    assert not (path / "tokenizer.json").exists()
    assert sorted(os.listdir(tmp_path)) == ["base", "one"]


def test_a_model_with_a_full_tower_is_an_ordinary_model_directory(base, processor, tmp_path):
    batch = ask(processor)
    model = shake(get_peft_model(load(base), {"language": "full", "projector": "full"}))
    with torch.no_grad():
        want = model(**batch).logits
        path = save_model(model, tmp_path / "model", processor=processor)
        torch.testing.assert_close(load(path)(**batch).logits, want, atol=0, rtol=0)
    assert load(path).lm_head.weight is not None
    adapter = save_adapter(get_peft_model(load(path), {"language": {"r": 2}}), tmp_path / "adapter")
    assert PeftConfig.from_pretrained(adapter).base_model_name_or_path == str(path.resolve())
