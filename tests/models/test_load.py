import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmpeft.core.errors import AdapterError, ModelError
from mmpeft.models.load import adapter_base, load_model, load_processor
from tests.tiny import tiny_clip, tiny_llama, tiny_llava, tiny_processor, tiny_tokenizer

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(tmp_path, llava, processor):
    llava.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def make_adapter(base, folder, **options):
    model, _ = load_model(base, device="cpu")
    config = LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.q_proj",
        modules_to_save=["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
        init_lora_weights=False,
        **options,
    )
    peft_model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    peft_model.save_pretrained(folder)
    return peft_model


@pytest.fixture
def adapter(base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def inputs():
    return tiny_processor()(images=Image.new("RGB", (9, 9)), text="<image>这是什么?", return_tensors="pt")


def logits(model):
    with torch.no_grad():
        return model(**inputs()).logits


def test_a_base_with_its_processor(base, llava):
    model, processor = load_model(base, device="cpu")
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert not model.training
    torch.testing.assert_close(logits(model), logits(llava))


def test_dtype(base):
    model, _ = load_model(base, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_by_itself_and_on_a_named_base(base, tmp_path, dora):
    expected = logits(make_adapter(base, tmp_path / "adapter", use_dora=dora))
    for model, _ in (
        load_model(tmp_path / "adapter", device="cpu"),
        load_model(base, adapter=tmp_path / "adapter", device="cpu"),
    ):
        assert isinstance(model, PeftModel)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_the_adapters_own_processor_goes_first(base, adapter):
    _, processor = load_model(adapter, device="cpu")
    assert processor.chat_template == tiny_processor().chat_template
    changed = tiny_processor()
    changed.chat_template = "{{ 'the adapter speaks' }}"
    changed.save_pretrained(adapter)
    _, processor = load_model(adapter, device="cpu")
    assert processor.chat_template == "{{ 'the adapter speaks' }}"
    assert load_processor(base).chat_template == tiny_processor().chat_template


def test_dora_magnitudes_by_the_name_that_transformers_reads(base, tmp_path):
    expected = logits(make_adapter(base, tmp_path / "adapter", use_dora=True))
    state = load_file(tmp_path / "adapter" / WEIGHTS)
    named = {f"{name}.weight" if name.endswith("magnitude_vector") else name: state[name] for name in state}
    assert named.keys() != state.keys()
    save_file(named, tmp_path / "adapter" / WEIGHTS, {"format": "pt"})
    torch.testing.assert_close(logits(load_model(tmp_path / "adapter", device="cpu")[0]), expected)


class TestBaseThatMoved:
    @pytest.mark.parametrize("name", [None, "runs/base", "../../runs/base"])
    def test_is_found_again_from_the_adapter(self, base, adapter, tmp_path, name):
        expected = logits(load_model(adapter, device="cpu")[0])
        (adapter / "mmpeft.json").write_text(json.dumps({"base_model_relative": "../base"}))
        shutil.move(tmp_path / "base", tmp_path / "other" / "base")
        shutil.move(tmp_path / "adapter", tmp_path / "other" / "adapter")
        moved = tmp_path / "other" / "adapter"
        rename_base(moved, name or str(tmp_path / "base"))
        assert adapter_base(moved) == str(tmp_path / "other" / "base")
        torch.testing.assert_close(logits(load_model(moved, device="cpu")[0]), expected)

    @pytest.mark.parametrize("facts", [None, {}, {"base_model_relative": "../gone"}])
    def test_is_an_error_that_says_what_to_do(self, base, adapter, facts):
        if facts is not None:
            (adapter / "mmpeft.json").write_text(json.dumps(facts))
        shutil.rmtree(base)
        with pytest.raises(AdapterError, match=r"base does not exist any more; .*load_model\(BASE, adapter="):
            load_model(adapter, device="cpu")

    def test_hub_base_that_cannot_be_reached(self, adapter):
        rename_base(adapter, "someone/gone")
        with pytest.raises(AdapterError, match=r"its base model cannot be read .*HF_HUB_OFFLINE.*load_model\(BASE"):
            load_model(adapter, device="cpu")

    def test_adapter_that_names_none(self, adapter):
        rename_base(adapter, None)
        with pytest.raises(AdapterError, match="names no base model"):
            load_model(adapter, device="cpu")


def rename_base(adapter, name):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))


class TestAdapterThatDoesNotFit:
    def change(self, adapter, change):
        state = load_file(adapter / WEIGHTS)
        save_file(dict(change(name, tensor) for name, tensor in state.items()), adapter / WEIGHTS, {"format": "pt"})

    def test_other_key_prefixes_would_silently_do_nothing(self, adapter):
        self.change(adapter, lambda name, tensor: (name.replace("language_model.", "text_model."), tensor))
        with pytest.raises(
            AdapterError, match=r"4 are lacking: base_model\S+, .*; 4 have no place in the model: .*text_model"
        ):
            load_model(adapter, device="cpu")

    def test_projector_left_out(self, adapter):
        state = load_file(adapter / WEIGHTS)
        save_file({n: t for n, t in state.items() if "projector" not in n}, adapter / WEIGHTS, {"format": "pt"})
        with pytest.raises(AdapterError, match=r"it lacks 'base_model\.model\.model\.multi_modal_projector"):
            load_model(adapter, device="cpu")

    def test_other_shapes(self, adapter):
        self.change(adapter, lambda name, tensor: (name, tensor[..., :1].contiguous()))
        with pytest.raises(AdapterError, match=r"does not fit LlavaForConditionalGeneration .*size mismatch"):
            load_model(adapter, device="cpu")

    def test_other_modules(self, adapter):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "nothing_of_this"}))
        with pytest.raises(AdapterError, match="does not fit LlavaForConditionalGeneration"):
            load_model(adapter, device="cpu")

    def test_cut_short(self, adapter):
        (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:200])
        with pytest.raises(AdapterError, match=r"does not fit|not whole"):
            load_model(adapter, device="cpu")

    @pytest.mark.parametrize(("text", "said"), [("{", "cannot be read"), ("[]", "holds a list")])
    def test_settings_that_cannot_be_read(self, base, adapter, text, said):
        (adapter / "adapter_config.json").write_text(text)
        for load in (lambda: load_model(adapter, device="cpu"), lambda: load_model(base, adapter=adapter)):
            with pytest.raises(AdapterError, match=rf"adapter_config.json: {said}.*train or copy it again"):
                load()

    def test_weights_that_are_no_numbers(self, adapter):
        self.change(adapter, lambda name, tensor: (name, tensor * float("nan") if "lora_B" in name else tensor))
        with pytest.raises(AdapterError, match=r"lora_B\S* has weights that are NaN or infinite"):
            load_model(adapter, device="cpu")

    def test_pickled_weights(self, base, adapter):
        torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
        (adapter / WEIGHTS).unlink()
        with pytest.raises(AdapterError, match=r"no adapter_model.safetensors there \(a pickled .bin can run code"):
            load_model(base, adapter=adapter, device="cpu")

    def test_directory_without_an_adapter(self, base, tmp_path):
        with pytest.raises(AdapterError, match=r"no adapter_config.json and no adapter_model.safetensors there"):
            load_model(base, adapter=base, device="cpu")
        with pytest.raises(AdapterError, match="no such directory"):
            load_model(base, adapter=tmp_path / "nothing", device="cpu")

    def test_hub_adapter_while_offline(self, base):
        with pytest.raises(
            AdapterError, match=r"someone/adapter: no such directory here, and the Hub cannot be reached"
        ):
            load_model(base, adapter="someone/adapter", device="cpu")


class TestBaseThatCannotBeRead:
    def test_no_such_path(self):
        with pytest.raises(
            ModelError, match="runs/a/model: no such directory; expected a model's directory or a hub id"
        ):
            load_model("runs/a/model")

    def test_hub_id_while_offline(self):
        with pytest.raises(ModelError, match=r"someone/nothing: no such directory here, and the Hub cannot be reached"):
            load_model("someone/nothing", device="cpu")

    def test_a_file(self, base):
        with pytest.raises(ModelError, match="is a file; expected a model's directory"):
            load_model(base / "config.json", device="cpu")

    def test_empty_directory(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModelError, match="is an empty directory"):
            load_model(tmp_path / "empty", device="cpu")

    def test_directory_without_a_configuration(self, tmp_path):
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(ModelError, match=f"{tmp_path}: cannot be read as a model"):
            load_model(tmp_path, device="cpu")

    @pytest.mark.parametrize(
        ("make", "kind"), [(lambda: tiny_llama(tiny_tokenizer()), "llama"), (tiny_clip, "clip_vision")]
    )
    def test_not_a_multimodal_model(self, make, kind, tmp_path):
        make().save_pretrained(tmp_path)
        with pytest.raises(
            ModelError, match=rf"model type '{kind}.*' is not supported; supported: llava, .*mmpeft_composed"
        ):
            load_model(tmp_path, device="cpu")

    def test_pickled_weights(self, base):
        torch.save(tiny_llava().state_dict(), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        with pytest.raises(
            ModelError, match=r"no safetensors weights \(found: pytorch_model.bin\); pickled weights can run"
        ):
            load_model(base, device="cpu")

    def test_weights_cut_short(self, base):
        (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:3000])
        with pytest.raises(ModelError, match="not whole"):
            load_model(base, device="cpu")

    def test_weights_that_are_lacking(self, base):
        state = load_file(base / "model.safetensors")
        name = next(name for name in state if "linear_1.weight" in name)
        save_file({key: state[key] for key in state if key != name}, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            ModelError, match=r"1 weights are not in the checkpoint and would be random, first .*linear_1"
        ):
            load_model(base, device="cpu")

    def test_no_processor(self, base):
        (base / "processor_config.json").unlink()
        with pytest.raises(ModelError, match="processor"):
            load_model(base, device="cpu")

    def test_code_that_comes_along(self, tmp_path):
        config = {"model_type": "mystery", "auto_map": {"AutoConfig": "mystery.MysteryConfig"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "mystery.py").write_text("raise SystemExit('ran')")
        with pytest.raises(ModelError, match="brings code of its own; read it, then allow it: --trust-remote-code"):
            load_model(tmp_path, device="cpu")
