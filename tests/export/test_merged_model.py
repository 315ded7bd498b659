"""`mmpeft.merge`: an ordinary model directory, whole or not there, written in the memory of about one shard."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
)

import mmpeft
from mmpeft import get_peft_model, load_model, save_adapter
from mmpeft.core.errors import AdapterError, ModelError, OutputError, RecipeError
from mmpeft.core.hashing import hash_file
from mmpeft.export.merged_model import merge
from mmpeft.export.publishable import open_publishable
from mmpeft.methods.checkpoint import save_model
from mmpeft.pipeline.answering import open_model
from tests.families.qwen import tiny_whole_omni
from tests.hub import local_hub
from tests.methods.test_attach import ask
from tests.methods.test_checkpoint import load, shake
from tests.models import test_composed as composed
from tests.plain import PRELUDE
from tests.project import write_base
from tests.tiny import tiny_clip_config

BOTH = {"projector": "full", "language": {"r": 2}}


@pytest.fixture
def base(tmp_path):
    folder = write_base(tmp_path / "base")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "README.md").write_text("the base's card")
    return folder


def trained(base, path, train=BOTH, **options):
    model = shake(get_peft_model(load(base), train))
    save_adapter(model, path, **options)
    return model


@torch.no_grad()
def test_it_is_an_ordinary_model_with_its_processor(base, processor, tmp_path):
    processor.tokenizer.chat_template = processor.chat_template = "{{ 'the adapter has another' }}"
    model = trained(base, tmp_path / "adapter", processor=processor, facts={"metrics": {"after": {"anls": 0.5}}})
    done = mmpeft.merge(tmp_path / "adapter", tmp_path / "merged")
    assert (done.output, done.base, done.adapter) == (
        tmp_path / "merged",
        str(base.resolve()),
        str(tmp_path / "adapter"),
    )
    assert (done.tensors, done.changed, done.shards, done.untied) == (63, 18, 1, False)
    again = AutoProcessor.from_pretrained(done.output)
    assert again.chat_template == processor.chat_template
    batch = ask(write_base_processor(base))
    torch.testing.assert_close(load(done.output)(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert (done.output / "LICENSE").read_text() == "Apache-2.0"
    assert not (done.output / "README.md").exists()
    generation = json.loads((done.output / "generation_config.json").read_text())
    assert generation == json.loads((base / "generation_config.json").read_text())
    facts = json.loads((done.output / "mmpeft.json").read_text())
    assert facts["artefact"] == "merged model"
    assert facts["metrics"] == {"after": {"anls": 0.5}}
    assert facts["base_model"] == str(base.resolve())


def write_base_processor(base):
    return AutoProcessor.from_pretrained(base)


def test_plain_transformers_loads_it(base, tmp_path):
    trained(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", shard_size="40KB")
    program = (
        f"{PRELUDE}\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model, report = AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'merged')!r}, "
        "output_loading_info=True)\n"
        f"AutoProcessor.from_pretrained({str(tmp_path / 'merged')!r})\n"
        "assert not any(report.values()), report\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2


@torch.no_grad()
def test_an_adapter_on_one_of_two_tied_weights_makes_them_two(base, tmp_path):
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = trained(base, tmp_path / "adapter", {"language": {"r": 2, "target_modules": ["lm_head"]}})
    done = merge(tmp_path / "adapter", tmp_path / "merged")
    assert done.untied
    assert done.tensors == 64
    batch = ask(write_base_processor(base))
    merged = load(done.output)
    assert merged.lm_head.weight is not merged.get_input_embeddings().weight
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)


def test_the_directory_of_a_run_means_the_adapter_in_it(base, tmp_path):
    trained(base, tmp_path / "run" / "adapter")
    assert merge(tmp_path / "run", tmp_path / "merged").adapter == str(tmp_path / "run" / "adapter")


@torch.no_grad()
def test_a_composed_model_brings_its_own_code(tmp_path):
    model, processor = composed.own("resampler", language="gemma2")
    save_model(model, tmp_path / "base", processor=processor)
    model, processor = load_model(tmp_path / "base", device="cpu")
    batch = composed.ask(processor)
    adapted = shake(get_peft_model(model, {"projector": "full", "language": {"r": 2}}))
    save_adapter(adapted, tmp_path / "adapter")
    done = merge(tmp_path / "adapter", tmp_path / "merged")
    again, _ = load_model(done.output, device="cpu")
    torch.testing.assert_close(again(**batch).logits, adapted(**batch).logits, atol=1e-5, rtol=0)
    assert {file.name for file in done.output.glob("*.py")} == {file.name for file in (tmp_path / "base").glob("*.py")}


@torch.no_grad()
def test_of_a_whole_omni_model_the_thinker_is_merged_and_the_talker_kept(tmp_path):
    checkpoint = tiny_whole_omni(tmp_path / "omni")
    omni = AutoModelForMultimodalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    adapted = shake(get_peft_model(omni, {"projector": "full", "language": {"r": 2}}))
    save_adapter(adapted, tmp_path / "adapter")
    want = adapted.merge_and_unload().state_dict()
    done = merge(tmp_path / "adapter", tmp_path / "merged", base=checkpoint)
    merged = AutoModelForMultimodalLM.from_pretrained(done.output, dtype=torch.float32)
    found = merged.thinker.state_dict()
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
    before, after = omni.talker.state_dict(), merged.talker.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (done.output / "spk_dict.pt").is_file()


HUB = """
import json, sys
from pathlib import Path
import torch
import mmpeft
from mmpeft.export.sources import base_facts
from mmpeft.models.load import FACTS_NAME
from safetensors.torch import load_file
from tests.methods.test_checkpoint import shake

base, out = sys.argv[1], Path(sys.argv[2])
if not (out / "adapter").exists():
    model, processor = mmpeft.load_model(base, device="cpu")
    model = shake(mmpeft.get_peft_model(model, {"language": {"r": 2}}))
    mmpeft.save_adapter(model, out / "adapter", processor=processor, facts=base_facts(base))
done = mmpeft.merge(out / "adapter", out / sys.argv[3])
facts = json.loads((out / "adapter" / FACTS_NAME).read_text())
print(json.dumps([done.base, facts["base_revision"]]))
"""


LOADED = """
import json, sys
import mmpeft

def norm(name):
    model, _ = mmpeft.load_model(name, device="cpu")
    return next(float(weight[0]) for name, weight in model.named_parameters() if name.endswith("norm.weight"))

print(json.dumps([norm(sys.argv[2] + "/adapter"), norm(sys.argv[1])]))
"""


@pytest.mark.slow
def test_of_a_base_on_the_hub_the_revision_counts_that_was_trained_on(tmp_path):
    with local_hub(tmp_path / "hub") as hub:
        hub.create("me/base")
        first = hub.commit("me/base", lambda draft: write_base(draft))

        def change(draft):
            state = load_file(draft / "model.safetensors")
            save_file({key: value + 1 for key, value in state.items()}, draft / "model.safetensors", {"format": "pt"})

        arguments = ("me/base", tmp_path)
        said = json.loads(hub.python(HUB, *arguments, "one", home=tmp_path / "home"))
        assert said == ["me/base", first]
        hub.commit("me/base", change)
        hub.python(HUB, *arguments, "two", home=tmp_path / "other-home")
        seen = [hub.python(LOADED, *arguments, home=tmp_path / home) for home in ("home", "fresh-home")]
        assert seen[0] == seen[1]
        assert json.loads(seen[0])[0] == json.loads(seen[0])[1] - 1
        one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in one)
        shutil.rmtree(hub.repos / "me/base" / first)
        with pytest.raises(
            AssertionError, match=rf"base model at revision {first}, on which it was trained, cannot be"
        ):
            hub.python(HUB, *arguments, "three", home=tmp_path / "third-home")
        assert not (tmp_path / "three").exists()


def test_a_model_that_a_stage_wrote_is_copied(base, processor, tmp_path):
    model = shake(get_peft_model(load(base), {"language": "full"}))
    save_model(model, tmp_path / "model", processor=processor, facts={"recipe": 1})
    done = merge(tmp_path / "model", tmp_path / "copy")
    assert done.adapter is None
    assert done.changed == 0
    copy = load(done.output).state_dict()
    assert all(torch.equal(weight, copy[name]) for name, weight in load(tmp_path / "model").state_dict().items())
    assert json.loads((done.output / "mmpeft.json").read_text())["recipe"] == 1


def test_a_merged_model_is_a_base_for_another_adapter(base, tmp_path):
    trained(base, tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    trained(tmp_path / "merged", tmp_path / "next")
    with pytest.raises(OutputError, match=r"would replace .*merged, which is read"):
        merge(tmp_path / "next", tmp_path / "merged")
    assert merge(tmp_path / "next", tmp_path / "again").changed == 18
    assert merge(tmp_path / "next", tmp_path / "again").changed == 18


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda base, adapter: shutil.rmtree(base), AdapterError, "does not exist any more; put it back"),
        (lambda base, adapter: (base / "model.safetensors").unlink(), ModelError, "no model.safetensors there"),
        (lambda base, adapter: cut(base / "model.safetensors"), ModelError, "not a whole safetensors file"),
        (
            lambda base, adapter: (base / "processor_config.json").unlink(),
            ModelError,
            "no processor there .*none beside the adapter",
        ),
        (lambda base, adapter: (base / "config.json").write_text("{"), ModelError, "cannot be read"),
        (lambda base, adapter: cut(adapter / "adapter_model.safetensors"), AdapterError, "it is not whole"),
        (lambda base, adapter: (adapter / "adapter_config.json").write_text("{"), AdapterError, "cannot be read"),
        (lambda base, adapter: (adapter / "adapter_config.json").write_text("[]"), AdapterError, "holds a list"),
        (lambda base, adapter: (adapter / "mmpeft.json").write_text("{"), AdapterError, "mmpeft.json: cannot be read"),
        (lambda base, adapter: (adapter / "mmpeft.json").write_text("[]"), AdapterError, "mmpeft.json: holds a list"),
        (lambda base, adapter: remote_code(base), ModelError, "brings code of its own"),
    ],
    ids=[
        "base",
        "weights",
        "cut",
        "processor",
        "config",
        "adapter",
        "settings",
        "no settings",
        "facts",
        "no facts",
        "code",
    ],
)
def test_what_is_lacking_or_damaged_leaves_nothing(spoil, error, message, base, tmp_path):
    trained(base, tmp_path / "adapter")
    spoil(base, tmp_path / "adapter")
    with pytest.raises(error, match=message):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not [name for name in os.listdir(tmp_path) if "merged" in name]


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def remote_code(base):
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.M"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "evil.py").write_text(f"open({str(base / 'ran')!r}, 'w')\nclass Config: pass\nclass M: pass\n")


def test_code_that_comes_with_a_base_does_not_run(base, tmp_path):
    trained(base, tmp_path / "adapter")
    remote_code(base)
    with pytest.raises(ModelError, match="brings code of its own"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (base / "ran").exists()


def test_room_is_asked_for_before_anything_is_written(base, tmp_path, monkeypatch):
    trained(base, tmp_path / "adapter")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(10**6))
    with pytest.raises(OutputError, match=r"will be written, but 977 KiB are free there"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_size_that_is_none_is_refused_first(tmp_path):
    with pytest.raises(RecipeError, match="shard size 'large'"):
        merge(tmp_path / "nowhere", tmp_path / "merged", shard_size="large")


SHARD = 20 * 10**6

# Of a program started by another, `ru_maxrss` is at least what that one had; VmHWM (proc(5)) is its own.
MEASURE = """
import sys
import mmpeft
from mmpeft.core.memory import memory_in_use
mmpeft.merge
before = memory_in_use("cpu")
mmpeft.merge(sys.argv[1], sys.argv[2], shard_size=int(sys.argv[3]))
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(int(status["VmHWM"].split()[0]) * 1024 - before)
"""


def large_base(folder, processor):
    """A LLaVA of about 230 MB, in one file; its largest matrix has 6.3 MB."""
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    config = LlavaConfig(
        vision_config=tiny_clip_config().to_dict(), text_config=text.to_dict(), image_token_index=0, image_seq_length=4
    )
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dora", [False, True])
def test_memory_holds_about_one_shard(dora, processor, tmp_path):
    large_base(tmp_path / "large", processor)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > 10 * SHARD
    trained(tmp_path / "large", tmp_path / "adapter", {"language": {"r": 4, "use_dora": dora}, "projector": "full"})
    arguments = [tmp_path / "adapter", tmp_path / "merged", SHARD]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], check=True, capture_output=True, text=True, timeout=500
    )
    peak = int(done.stdout.split()[-1])
    print(f"peak {peak / 1e6:.0f} MB beyond what was in use, model {size / 1e6:.0f} MB, shard {SHARD / 1e6:.0f} MB")
    # A shard, the model without weights, and a few times the largest matrix in the hands of PEFT.
    assert peak < 5 * SHARD < size / 2


@pytest.mark.slow
def test_ctrl_c_at_any_stage_leaves_nothing_or_all(processor, tmp_path):
    large_base(tmp_path / "large", processor)
    trained(tmp_path / "large", tmp_path / "adapter", {"language": {"r": 4}})
    program = (
        "import _thread, sys, threading, time\n"
        "import mmpeft\n"
        "mmpeft.merge  # imported before the clock starts\n"
        "def stop():\n"
        "    time.sleep(float(sys.argv[3]))\n"
        "    _thread.interrupt_main()\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "mmpeft.merge(sys.argv[1], sys.argv[2], shard_size='20MB')\n"
    )
    interrupted = 0
    for wait in (0.3, 0.8, 1.2, 1.6, 2.0, 2.6):
        out = tmp_path / "out" / f"{wait}"
        out.parent.mkdir(exist_ok=True)
        arguments = [sys.executable, "-c", program, str(tmp_path / "adapter"), str(out), str(wait)]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
        interrupted += done.returncode != 0
        assert [name for name in os.listdir(out.parent) if name.startswith(".")] == []
        if out.exists():
            AutoModelForImageTextToText.from_pretrained(out)
            shutil.rmtree(out)
    assert interrupted


def test_weights_of_two_adapters_do_not_mix(base, tmp_path):
    """Nothing of one merge is left in the next, in the same process."""
    trained(base, tmp_path / "one")
    model = trained(base, tmp_path / "two", {"language": {"r": 3}})
    merge(tmp_path / "one", tmp_path / "merged-one")
    done = merge(tmp_path / "two", tmp_path / "merged-two")
    batch = ask(write_base_processor(base))
    with torch.no_grad():
        torch.testing.assert_close(load(done.output)(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)


def test_a_base_given_by_hand_takes_the_named_ones_place(base, tmp_path):
    trained(base, tmp_path / "adapter")
    moved = base.rename(tmp_path / "moved")
    done = merge(tmp_path / "adapter", tmp_path / "merged", base=moved)
    assert done.base == str(moved)
    save_file({"a": torch.zeros(1)}, moved / "model.safetensors")
    with pytest.raises(AdapterError, match="does not store"):
        merge(tmp_path / "adapter", tmp_path / "merged-2", base=moved)


def test_a_base_that_has_changed_since_training_is_refused(base, tmp_path):
    record = {"role": "model", "name": str(base), "files": {"model.safetensors": hash_file(base / "model.safetensors")}}
    trained(base, tmp_path / "adapter", facts={"base": [record]})
    merge(tmp_path / "adapter", tmp_path / "merged")
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match=r"model.safetensors has changed since .* --base"):
        merge(tmp_path / "adapter", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert merge(tmp_path / "adapter", tmp_path / "other", base=base).changed
    # In other files, too.
    (base / "model.safetensors").rename(base / "renamed.safetensors")
    with pytest.raises(AdapterError, match=r"has renamed.safetensors, where the adapter was trained on model.safet"):
        merge(tmp_path / "adapter", tmp_path / "third")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"base_revision": "../../../ref"}, "base_revision is '../../../ref', no commit on the Hub"),
        ({"base_revision": ["main"]}, "no commit"),
        ({"base_revision": ""}, "no commit"),
        ({"base_weights": 5}, "base_weights is '5'"),
        ({"base_weights": {"a": 1}}, "base_weights"),
        ({"base": "s"}, "base is 's'"),
        ({"base": [5]}, "base is"),
        ({"base": [{"role": "model", "files": ["x"]}]}, "base is"),
        ({"base_model_relative": 5}, "base_model_relative is '5'"),
    ],
)
def test_facts_that_cannot_be_are_named(facts, said, base, tmp_path):
    trained(base, tmp_path / "adapter", facts=facts)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "me/nowhere"))
    for read in (lambda: merge(tmp_path / "adapter", tmp_path / "merged"), lambda: load_model(tmp_path / "adapter")):
        with pytest.raises(AdapterError, match=r"mmpeft\.json: .*" + re.escape(said)):
            read()


def test_of_several_adapters_by_names_one_has_to_be_given(base, processor, tmp_path):
    model = peft.get_peft_model(load(base), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "both")
    for open_it in (lambda name: merge(name, tmp_path / "out"), lambda name: open_model(str(name)), open_publishable):
        with pytest.raises(AdapterError, match=r"both: no adapter itself, but it holds first, second; .*both/first"):
            open_it(tmp_path / "both")
    assert merge(tmp_path / "both" / "first", tmp_path / "out").changed == 4
