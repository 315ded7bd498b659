import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmpeft import get_peft_model, save_adapter
from mmpeft.cli import main
from tests.methods.test_checkpoint import load, shake
from tests.project import write_base


@pytest.fixture
def folder(tmp_path):
    base = write_base(tmp_path / "base")
    for name, train in (("projector", {"projector": "full"}), ("lora", {"language": {"r": 2}})):
        save_adapter(shake(get_peft_model(load(base), train)), tmp_path / "runs" / name)
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(main.app, ["adapters", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    found = run("list", folder / "runs")
    assert "runs/lora" in found
    assert "runs/projector" in found
    entries = json.loads(run("list", folder, "--json"))["adapters"]
    assert [(entry["kind"], entry["rank"]) for entry in entries] == [("LoRA", 2), ("projector", None)]
    assert "no adapter under" in run("list", folder / "base")


def test_diff(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    one, two = folder / "runs" / "projector", folder / "runs" / "lora"
    assert "both do the same" in run("diff", one, one)
    found = run("diff", one, two)
    assert "only in the first: model.multi_modal_projector.linear_1.bias" in found
    assert "only in the second: model.language_model.layers.0.mlp.down_proj" in found
    assert json.loads(run("diff", one, two, "--json"))["same"] is False
    save_adapter(shake(get_peft_model(load(folder / "base"), {"language": {"r": 2}}), 5), folder / "other")
    found = run("diff", two, folder / "other")
    assert "norm of first" in found
    assert len(json.loads(run("diff", two, folder / "other", "--json"))["lora"]) == 14


def test_average_combine_and_convert(folder):
    one, two = folder / "runs" / "projector", folder / "runs" / "lora"
    assert "wrote" in run("combine", one, two, "--out", folder / "both")
    found = json.loads(run("average", two, two, "--out", folder / "mean", "--weight", 2, "--weight", 1, "--json"))
    assert found == {"output": str(folder / "mean")}
    state = load_file(one / "adapter_model.safetensors")
    old = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
    torch.save({f"{old[key.split('.')[-2]]}.{key.split('.')[-1]}": t for key, t in state.items()}, folder / "p.bin")
    found = run("convert", folder / "p.bin", folder / "converted", "--base", folder / "base")
    assert "read p.bin" in found
    assert "LoRA on 0 modules, 2 modules saved whole" in found
    again = load_file(folder / "converted" / "adapter_model.safetensors")
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_names_can_be_copied_from_a_narrow_terminal(folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    (folder / "runs" / "damaged").mkdir()
    (folder / "runs" / "damaged" / "adapter_config.json").write_text("{")
    (folder / "runs" / "damaged" / "adapter_model.safetensors").write_text("")
    found = run("list", folder)
    assert "\u2026" not in found
    assert f"{folder / 'runs' / 'damaged' / 'adapter_config.json'}: cannot be read" in found
    assert "train or copy it again" in found
    save_adapter(shake(get_peft_model(load(folder / "base"), {"language": {"r": 2}}), 5), folder / "further")
    assert "\u2026" not in run("diff", folder / "runs" / "lora", folder / "further")
