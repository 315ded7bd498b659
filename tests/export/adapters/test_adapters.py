"""Adapters listed, compared, averaged and combined: figures against what the models compute."""

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from mmpeft import get_peft_model, save_adapter
from mmpeft.core.errors import AdapterError, RecipeError
from mmpeft.export.adapters.comparing import diff_adapters
from mmpeft.export.adapters.converting import convert_adapter
from mmpeft.export.adapters.joining import average_adapters, combine_adapters
from mmpeft.export.adapters.listing import list_adapters
from mmpeft.export.merge import merged_tensors
from tests.families.shrink import tiny_model
from tests.methods.test_attach import ask
from tests.methods.test_checkpoint import load, shake

BOTH = {"projector": "full", "language": {"r": 2, "lora_alpha": 6}}


def merged(base, adapter):
    return {name: tensor.double() for name, tensor in merged_tensors(base, adapter)}


def test_the_list_says_what_each_is(trained, base, tmp_path):
    facts = {"stages": ["projector", "language"], "metrics": {"after": {"anls": 0.5}}}
    path, model = trained("runs/a/adapter", BOTH, facts=facts)
    trained("runs/b", {"language": {"r": 4, "use_dora": True}})
    broken, _ = trained("runs/c", {"projector": "full"})
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    (tmp_path / "runs" / "pickled").mkdir()
    (tmp_path / "runs" / "pickled" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "runs" / "pickled" / "adapter_model.bin").write_bytes(b"x")
    first, second, third, fourth = list_adapters(tmp_path / "runs")
    assert (first.path, first.base, first.kind, first.rank, first.modules) == (
        path,
        str(base.resolve()),
        "projector + LoRA",
        2,
        14,
    )
    assert first.saved == ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2")
    assert first.parameters == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert (first.stages, first.metrics, first.problem) == (("projector", "language"), {"anls": 0.5}, None)
    assert (second.kind, second.rank) == ("DoRA", 4)
    assert "not a whole safetensors file" in third.problem
    assert "its weights are pickled" in fourth.problem
    with pytest.raises(AdapterError, match="no such folder"):
        list_adapters(tmp_path / "nowhere")


def test_the_difference_is_that_of_the_weights(trained, base, tmp_path):
    one, _ = trained("one", BOTH)
    two, _ = trained("two", {"projector": "full", "language": {"r": 3, "lora_alpha": 3}}, seed=2)
    diff = diff_adapters(one, two)
    assert diff.config["r"] == (2, 3)
    assert diff.config["lora_alpha"] == (6, 3)
    assert not diff.same
    start, first, second = (merged(base, adapter) for adapter in (None, one, two))
    rows = {row.name: row for row in diff.lora}
    assert len(rows) == 14
    for name, tensor in start.items():
        module = name.replace("language_model.model.", "model.language_model.").removesuffix(".weight")
        if module in rows:
            row = rows.pop(module)
            a, b = first[name] - tensor, second[name] - tensor
            assert row.first == pytest.approx(float(a.norm()), rel=1e-4)
            assert row.second == pytest.approx(float(b.norm()), rel=1e-4)
            assert row.difference == pytest.approx(float((a - b).norm()), rel=1e-4)
            cosine = float((a * b).sum() / a.norm() / b.norm())
            assert row.cosine == pytest.approx(cosine, abs=1e-4)
    assert not rows
    assert [row.difference for row in diff.lora] == sorted((row.difference for row in diff.lora), reverse=True)
    assert {row.name.rpartition(".")[0] for row in diff.whole} == {
        "model.multi_modal_projector.linear_1",
        "model.multi_modal_projector.linear_2",
    }


def test_what_one_of_two_lacks_is_named(trained):
    one, _ = trained("one", {"projector": "full", "language": {"r": 2, "target_modules": ["q_proj"]}})
    two, _ = trained("two", {"language": {"r": 2, "target_modules": ["q_proj", "v_proj"]}})
    diff = diff_adapters(one, two)
    assert len(diff.only_first) == 4
    assert [name.rpartition(".")[2] for name in diff.only_second] == ["v_proj", "v_proj"]
    assert diff_adapters(one, one).same
    assert diff_adapters(one, one).config == {}


@pytest.mark.parametrize("weights", [(), (3, 1), (1.5, -0.5)])
@pytest.mark.parametrize(
    "other",
    [BOTH, {"projector": "full", "language": {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}}],
    ids=["same", "different"],
)
def test_the_average_is_that_of_the_merged_weights(other, weights, trained, base, tmp_path):
    one, _ = trained("one", BOTH)
    two, _ = trained("two", other, seed=2)
    out = average_adapters([one, two], tmp_path / "out", weights=weights)
    shares = [weight / sum(weights) for weight in weights] if weights else [0.5, 0.5]
    first, second, found = (merged(base, adapter) for adapter in (one, two, out))
    for name in first:
        want = shares[0] * first[name] + shares[1] * second[name]
        torch.testing.assert_close(found[name], want, atol=1e-6, rtol=1e-6)
    batch = ask(AutoProcessor.from_pretrained(out))
    with torch.no_grad():
        by_peft = PeftModel.from_pretrained(load(base), out).eval()(**batch).logits
        torch.testing.assert_close(load(out)(**batch).logits, by_peft, atol=1e-6, rtol=0)
    facts = json.loads((out / "mmpeft.json").read_text())
    assert facts["averaged"] == dict(zip(map(str, (one, two)), shares, strict=True))


def test_three_are_averaged_and_an_earlier_average_is_replaced(trained, base, tmp_path):
    paths = [trained(f"a{seed}", BOTH, seed=seed)[0] for seed in (1, 2, 3)]
    average_adapters(paths[:2], tmp_path / "out")
    out = average_adapters(paths, tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 6
    found, parts = merged(base, out), [merged(base, path) for path in paths]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, sum(part[name] for part in parts) / 3, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "language", [{"r": 2}, {"r": 2, "use_dora": True}, {"r": 2, "use_rslora": True}], ids=["lora", "dora", "rslora"]
)
@torch.no_grad()
def test_a_projector_and_a_lora_trained_apart_become_one(language, trained, base, tmp_path):
    one, projector = trained("one", {"projector": "full"})
    two, _ = trained("two", {"language": language}, seed=2)
    out = combine_adapters([one, two], tmp_path / "out")
    batch = ask(AutoProcessor.from_pretrained(base))
    # The LoRA on a base that holds the projector already.
    projector.merge_and_unload().save_pretrained(tmp_path / "with-projector")
    want = PeftModel.from_pretrained(load(tmp_path / "with-projector"), two).eval()(**batch).logits
    for found in (PeftModel.from_pretrained(load(base), out).eval(), load(out)):
        torch.testing.assert_close(found(**batch).logits, want, atol=1e-6, rtol=0)
    assert {**load_file(one / "adapter_model.safetensors"), **load_file(two / "adapter_model.safetensors")}.keys() == (
        load_file(out / "adapter_model.safetensors").keys()
    )
    assert (out / "processor_config.json").is_file()


def test_two_loras_add_up_where_both_lie(trained, base, tmp_path):
    one, _ = trained("one", {"language": {"r": 2, "target_modules": ["q_proj", "k_proj"]}, "projector": "full"})
    two, _ = trained("two", {"language": {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj"]}}, seed=2)
    out = combine_adapters([one, two], tmp_path / "out")
    start, first, second, found = (merged(base, adapter) for adapter in (None, one, two, out))
    for name, tensor in start.items():
        want = first[name] + second[name] - tensor
        torch.testing.assert_close(found[name], want, atol=1e-6, rtol=1e-6)


def test_what_cannot_be_one_is_refused(trained, base, tmp_path):
    lora, _ = trained("lora", {"language": {"r": 2}})
    dora, _ = trained("dora", {"language": {"r": 2, "use_dora": True}})
    one, _ = trained("one", {"projector": "full"})
    two, _ = trained("two", {"projector": "full"}, seed=2)
    inside, _ = trained("inside", {"projector": {"r": 2}})
    out = tmp_path / "out"
    with pytest.raises(AdapterError, match=r"use_dora is set: DoRA scales what it adds"):
        average_adapters([lora, dora], out)
    with pytest.raises(AdapterError, match=r"it does not hold model.multi_modal_projector"):
        average_adapters([lora, one], out)
    with pytest.raises(AdapterError, match=r"differs from that of .*average them instead"):
        combine_adapters([one, two], out)
    with pytest.raises(AdapterError, match=r"saves whole; one adapter cannot do both"):
        combine_adapters([one, inside], out)
    with pytest.raises(RecipeError, match="found one; expected two or more"):
        combine_adapters([one], out)
    for weights in ([1.0], [1.0, -1.0]):
        with pytest.raises(RecipeError, match="expected one for each"):
            average_adapters([lora, lora], out, weights=weights)
    config = json.loads((two / "adapter_config.json").read_text())
    (two / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another/base"}))
    with pytest.raises(AdapterError, match=r"trained on another/base, but .* only adapters of one base"):
        average_adapters([one, two], out)
    assert not out.exists()


def test_experts_are_not_added(tmp_path):
    model = tiny_model("qwen3_vl_moe")
    experts = {"r": 2, "target_parameters": ["mlp.experts.down_proj"]}
    path = save_adapter(shake(get_peft_model(model, {"language": experts})), tmp_path / "a")
    with pytest.raises(AdapterError, match="target_parameters is set: LoRA on experts lies in blocks"):
        average_adapters([path, path], tmp_path / "out")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), "no adapter_config.json there"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda path: (path / "adapter_config.json").write_text('{"peft_type": "IA3"}'), "only LORA is known"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors there"),
        (lambda path: half(path / "adapter_model.safetensors"), r"has no lora_B.weight"),
    ],
    ids=["config", "json", "type", "weights", "half"],
)
def test_a_damaged_adapter_is_named(spoil, message, trained):
    path, _ = trained("a", {"language": {"r": 2}})
    spoil(path)
    with pytest.raises(AdapterError, match=message):
        diff_adapters(path, path)


def half(file):
    state = load_file(file)
    save_file({name: tensor for name, tensor in state.items() if ".lora_A." in name}, file)


def test_an_average_of_an_average_is_exact_as_well(trained, base, tmp_path):
    one, _ = trained("one", BOTH)
    two, _ = trained("two", {"projector": "full", "language": {"r": 3, "target_modules": ["q_proj"]}}, seed=2)
    first = average_adapters([one, two], tmp_path / "first")
    second = average_adapters([first, one], tmp_path / "second")
    parts, found = [merged(base, path) for path in (first, one)], merged(base, second)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2, atol=1e-6, rtol=1e-6)
    assert sorted(os.listdir(first)) == sorted(os.listdir(second))


def test_weights_that_are_no_numbers_are_refused_by_name(trained, base, tmp_path):
    good, _ = trained("good", BOTH)
    bad, _ = trained("bad", BOTH)
    weights = load_file(bad / "adapter_model.safetensors")
    name = min(weights)
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    for make in (
        lambda: average_adapters([good, bad], tmp_path / "out"),
        lambda: combine_adapters([good, bad], tmp_path / "out"),
        lambda: diff_adapters(good, bad),
        lambda: convert_adapter(bad, tmp_path / "out", base=base),
    ):
        with pytest.raises(AdapterError, match=r"bad: .* has weights that are NaN or infinite"):
            make()
    assert not (tmp_path / "out").exists()
