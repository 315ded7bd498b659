"""Other programs' layouts become a plain adapter that computes the same; what does not fit is named."""

import json
import os
import pickle
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from mmpeft.core.errors import AdapterError
from mmpeft.export.adapters.converting import convert_adapter
from mmpeft.export.merge import merged_tensors
from tests.methods.test_attach import ask
from tests.methods.test_checkpoint import load

LORA = {"language": {"r": 4, "lora_alpha": 16}}
PREFIX = "base_model.model."


def weights(path):
    return load_file(path / "adapter_model.safetensors")


def as_llava(key):
    """A name of transformers as LLaVA's own code has it, with PEFT's prefix."""
    name = key.removeprefix(PREFIX)
    for new, old in (
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.layers.", "model.layers."),
    ):
        if name.startswith(new):
            return PREFIX + old + name.removeprefix(new)
    raise AssertionError(key)


@torch.no_grad()
def check(done, model, base):
    """The converted adapter computes what `model` does, by PEFT, by transformers and merged."""
    batch = ask(AutoProcessor.from_pretrained(base))
    want = model(**batch).logits
    by_peft = PeftModel.from_pretrained(load(base), done.output).eval()
    torch.testing.assert_close(by_peft(**batch).logits, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(load(done.output)(**batch).logits, want, atol=1e-6, rtol=0)
    assert dict(merged_tensors(base, done.output))
    assert (done.output / "processor_config.json").is_file()
    assert not [name for name in os.listdir(done.output) if name.endswith((".bin", ".pt"))]


@pytest.mark.parametrize("prefix", ["", PREFIX], ids=["pretraining", "finetuning"])
def test_llavas_projector(prefix, trained, base, tmp_path):
    path, model = trained("ours", {"projector": "full"})
    state = {as_llava(key).replace(PREFIX, prefix): tensor for key, tensor in weights(path).items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    done = convert_adapter(tmp_path / "mm_projector.bin", tmp_path / "out", base=base)
    assert done.lora == 0
    assert done.saved == ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    check(done, model, base)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_llavas_lora_with_what_it_trains_beside_it(kind, trained, base, tmp_path):
    path, model = trained("ours", {"projector": "full", **LORA})
    state = {as_llava(key): tensor for key, tensor in weights(path).items()}
    folder = tmp_path / "llava"
    folder.mkdir()
    torch.save(
        {key: value for key, value in state.items() if "mm_projector" in key}, folder / "non_lora_trainables.bin"
    )
    lora = {key: value for key, value in state.items() if ".lora_" in key}
    if kind == "bin":
        torch.save(lora, folder / "adapter_model.bin")
    else:
        save_file(lora, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = convert_adapter(folder, tmp_path / "out", base=base)
    assert (done.lora, len(done.saved)) == (14, 2)
    assert [file.name for file in done.files] == [f"adapter_model.{kind}", "non_lora_trainables.bin"]
    check(done, model, base)


def test_swifts_side_file_with_the_whole_tower(trained, base, tmp_path):
    path, model = trained("ours", {"projector": "full", **LORA})
    inner = model.get_base_model()
    generator = torch.Generator().manual_seed(3)
    side = {}
    for name, weight in inner.model.vision_tower.named_parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
        side[f"{PREFIX}model.vision_tower.{name}"] = weight.detach().clone()
    state = weights(path)
    side |= {key: value for key, value in state.items() if "projector" in key}
    folder = tmp_path / "swift"
    folder.mkdir()
    save_file(side, folder / "vit.safetensors")
    save_file({key: value for key, value in state.items() if ".lora_" in key}, folder / "adapter_model.safetensors")
    shutil.copy(path / "adapter_config.json", folder)
    done = convert_adapter(folder, tmp_path / "out", base=base)
    check(done, model, base)


def test_mindspeeds_lora(trained, base, tmp_path):
    path, model = trained("ours", LORA)
    folder = tmp_path / "mindspeed"
    folder.mkdir()
    state = {
        key.removeprefix(PREFIX).replace(".weight", ".default.weight"): tensor for key, tensor in weights(path).items()
    }
    save_file(state, folder / "lora_adapter_iteration_10.safetensors")
    with pytest.raises(AdapterError, match=r"no adapter_config.json beside it.*--lora-alpha"):
        convert_adapter(folder, tmp_path / "out", base=base)
    check(convert_adapter(folder, tmp_path / "out", base=base, lora_alpha=16), model, base)
    save_file(state, folder / "lora_adapter_iteration_20.safetensors")
    with pytest.raises(AdapterError, match="2 states of one LoRA, lora_adapter_iteration_10"):
        convert_adapter(folder, tmp_path / "out-2", base=base, lora_alpha=16)


@pytest.mark.parametrize(
    "train",
    [
        {"language": {"r": 4, "use_rslora": True}},
        {"projector": "full", "language": {"r": 4, "use_dora": True}},
        {"vision": {"r": 2, "lora_alpha": 4}, "language": {"r": 4, "lora_alpha": 16}},
    ],
    ids=["rslora", "dora", "ranks"],
)
def test_a_plain_adapter_stays_what_it_is(train, trained, base, tmp_path):
    path, model = trained("ours", train)
    check(convert_adapter(path, tmp_path / "out", base=base), model, base)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("name", ["mm_projector.bin", "non_lora_trainables.bin", "adapter_model.bin"])
def test_a_pickle_with_code_is_refused_and_does_not_run(name, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / name, "wb") as file:
        pickle.dump({"model.mm_projector.0.weight": Evil()}, file)
    torch.save({"model.mm_projector.0.weight": Evil()}, tmp_path / f"zip-{name}")
    for file in (name, f"zip-{name}"):
        with pytest.raises(AdapterError, match=r"holds more than tensors, and reading it could run code"):
            convert_adapter(tmp_path / file, tmp_path / "out", base=base)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"a": {"b": torch.zeros(1)}}, torch.zeros(2)])
def test_a_file_of_something_else_is_refused(content, base, tmp_path):
    torch.save(content, tmp_path / "mm_projector.bin")
    with pytest.raises(AdapterError, match="holds something else than tensors by name"):
        convert_adapter(tmp_path / "mm_projector.bin", tmp_path / "out", base=base)


def test_a_file_cut_short_is_refused(base, tmp_path):
    torch.save({"model.mm_projector.0.weight": torch.zeros(32, 16)}, tmp_path / "mm_projector.bin")
    whole = (tmp_path / "mm_projector.bin").read_bytes()
    for size in (0, 10, len(whole) // 2):
        (tmp_path / "mm_projector.bin").write_bytes(whole[:size])
        with pytest.raises(AdapterError, match=r"mm_projector.bin: (not a whole file|holds more)"):
            convert_adapter(tmp_path / "mm_projector.bin", tmp_path / "out", base=base)


def test_each_tensor_that_does_not_fit_is_named(trained, base, tmp_path):
    path, _ = trained("ours", {"projector": "full", **LORA})
    state = {as_llava(key).removeprefix(PREFIX): tensor for key, tensor in weights(path).items()}
    good = {key: tensor for key, tensor in state.items() if "mm_projector" in key}
    file = tmp_path / "mm_projector.bin"

    def fails(changes, message):
        torch.save({**good, **changes}, file)
        with pytest.raises(AdapterError, match=message):
            convert_adapter(file, tmp_path / "out", base=base, lora_alpha=8)
        assert not (tmp_path / "out").exists()

    fails({"model.vision_resampler.query": torch.zeros(3)}, r"1 have no place in it: model.vision_resampler.query")
    fails({"model.mm_projector.4.weight": torch.zeros(3, 3)}, r"no place in it: model.mm_projector.4.weight")
    fails(
        {"model.mm_projector.0.weight": torch.zeros(32, 17)},
        r"1 have another shape: model.mm_projector.0.weight \(\(32",
    )
    a, b = "model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_B.weight"
    fails({a: torch.zeros(4, 32)}, r"q_proj has no lora_B.weight; the adapter is not whole")
    fails({a: torch.zeros(4, 32), b: torch.zeros(33, 4)}, r"another shape: model.layers.0.self_attn.q_proj \(33 x 32")
    fails(
        {a.replace("q_proj", "qkv"): torch.zeros(4, 32), b.replace("q_proj", "qkv"): torch.zeros(32, 4)},
        r"no place in it: model.layers.0.self_attn.qkv",
    )


def test_two_files_that_contradict_each_other_are_refused(trained, base, tmp_path):
    path, _ = trained("ours", {"projector": "full"})
    state = {as_llava(key): tensor for key, tensor in weights(path).items()}
    folder = tmp_path / "llava"
    folder.mkdir()
    torch.save(state, folder / "non_lora_trainables.bin")
    torch.save({key: tensor + 1 for key, tensor in state.items()}, folder / "mm_projector.bin")
    with pytest.raises(AdapterError, match=r"mm_projector.bin: .* differs from that of non_lora_trainables.bin"):
        convert_adapter(folder, tmp_path / "out", base=base)


def test_a_folder_without_any_of_them_says_what_was_expected(base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match=r"no file there that can be converted; expected .*vit.safetensors"):
        convert_adapter(tmp_path / "empty", tmp_path / "out", base=base)
    with pytest.raises(AdapterError, match="no such file or directory"):
        convert_adapter(tmp_path / "nowhere", tmp_path / "out", base=base)
