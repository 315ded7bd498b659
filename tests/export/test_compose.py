"""`mmpeft compose`: projector into the base, pure LoRA beside it, the rest of the base untouched."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from mmpeft import get_peft_model, load_model, save_adapter
from mmpeft.core.errors import AdapterError, ModelError, OutputError
from mmpeft.export.compose import compose
from tests.methods.test_attach import ask
from tests.methods.test_checkpoint import load, shake
from tests.project import write_base

BOTH = {"projector": "full", "language": {"r": 2}}


@pytest.fixture
def base(tmp_path):
    folder = write_base(tmp_path / "base")
    model = load(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


def trained(base, path, train=BOTH):
    model = shake(get_peft_model(load(base), train))
    save_adapter(model, path, processor=AutoProcessor.from_pretrained(base))
    return model


@pytest.mark.parametrize(
    "train",
    [
        BOTH,
        {"projector": "full", "language": {"r": 2, "use_dora": True}},
        {"projector": "full", "vision": {"r": 2, "bias": "all"}},
        {"language": {"r": 2, "trainable_token_indices": [1, 2]}},
        {"projector": "full"},
    ],
    ids=["both", "dora", "biases", "tokens", "projector"],
)
@torch.no_grad()
def test_model_and_lora_together_answer_as_the_adapter_did(train, base, tmp_path):
    model = trained(base, tmp_path / "adapter", train)
    done = compose(tmp_path / "adapter", tmp_path / "out")
    batch = ask(AutoProcessor.from_pretrained(base))
    want = model(**batch).logits
    found = load(done.model)
    if done.adapter is None:
        assert train == {"projector": "full"}
    else:
        assert PeftConfig.from_pretrained(done.adapter).base_model_name_or_path == str(done.model.resolve())
        assert all(".lora_" in name for name in load_file(done.adapter / "adapter_model.safetensors"))
        found = PeftModel.from_pretrained(found, done.adapter).eval()
        torch.testing.assert_close(load(done.adapter)(**batch).logits, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(found(**batch).logits, want, atol=1e-6, rtol=0)


def test_only_files_that_change_are_written(base, tmp_path):
    trained(base, tmp_path / "adapter")
    done = compose(tmp_path / "adapter", tmp_path / "out")
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert sorted([*done.rewritten, *done.linked]) == files
    assert done.linked
    assert done.rewritten
    for file in files:
        same = os.path.samefile(base / file, done.model / file)
        assert same == (file in done.linked)
        before, after = load_file(base / file), load_file(done.model / file)
        differ = {name for name in before if not torch.equal(before[name], after[name])}
        assert all("multi_modal_projector" in name for name in differ)
        assert bool(differ) == (file in done.rewritten)
    assert done.baked == 4
    copied = compose(tmp_path / "adapter", tmp_path / "copies", link=False)
    assert (sorted(copied.copied), copied.linked) == (sorted(done.linked), ())
    assert not any(os.path.samefile(base / file, copied.model / file) for file in files)


def test_a_lora_alone_is_what_servers_take(base, tmp_path):
    trained(base, tmp_path / "adapter")
    done = compose(tmp_path / "adapter", tmp_path / "out")
    config = json.loads((done.adapter / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"], config["use_dora"]) == (None, "none", False)
    assert done.notes == ()
    trained(base, tmp_path / "dora", {"projector": "full", "language": {"r": 2, "use_dora": True}})
    assert compose(tmp_path / "dora", tmp_path / "out-2").notes == (
        "the adapter has DoRA (use_dora), which servers may not take",
    )


@torch.no_grad()
def test_both_move_together(base, tmp_path):
    model = trained(base, tmp_path / "adapter")
    done = compose(tmp_path / "adapter", tmp_path / "out")
    shutil.rmtree(base)
    done.model.parent.rename(tmp_path / "moved")
    again, processor = load_model(tmp_path / "moved" / "adapter")
    batch = ask(processor)
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-6, rtol=0)


def test_what_there_is_nothing_to_do_for_is_refused(base, tmp_path):
    trained(base, tmp_path / "lora", {"language": {"r": 2}})
    with pytest.raises(AdapterError, match="a pure LoRA already"):
        compose(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(AdapterError, match="a whole model, not an adapter"):
        compose(base, tmp_path / "out")
    trained(base, tmp_path / "adapter")
    with pytest.raises(OutputError, match="it holds"):
        compose(tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "out").exists()


def test_a_base_with_numbers_that_are_none_is_refused_in_linked_files_as_well(base, tmp_path):
    trained(base, tmp_path / "adapter", {"projector": "full", "language": {"r": 2}})
    file = min(base.glob("*.safetensors"))
    assert file.name not in compose(tmp_path / "adapter", tmp_path / "first").rewritten
    shutil.rmtree(tmp_path / "first")  # It has links to these files.
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: torch.full_like(weights[name], float("nan"))}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} has weights that are NaN or infinite; fetch it again"):
        compose(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
