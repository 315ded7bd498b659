import json

import pytest
from typer.testing import CliRunner

from mmpeft import get_peft_model, save_adapter
from mmpeft.cli import main
from tests.methods.test_checkpoint import load, shake
from tests.project import write_base


@pytest.fixture
def adapter(tmp_path):
    base = write_base(tmp_path / "base")
    return save_adapter(
        shake(get_peft_model(load(base), {"projector": "full", "language": {"r": 2}})), tmp_path / "adapter"
    )


def run(*arguments):
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def test_merge_says_what_it_did(adapter, tmp_path):
    result = run("merge", adapter, tmp_path / "merged", "--shard-size", "40KB")
    assert result.exit_code == 0, result.output
    assert "merged 18 of 63 tensors" in result.stdout
    assert "in 4 files" in result.stdout
    found = json.loads(run("merge", adapter, tmp_path / "merged", "--json").stdout)
    assert found["output"] == str(tmp_path / "merged")
    assert (found["changed"], found["tensors"], found["shards"], found["untied"]) == (18, 63, 1, False)
    assert "a whole model, with nothing to merge" in run("merge", tmp_path / "merged", tmp_path / "copy").stdout


def test_compose_says_what_it_did(adapter, tmp_path):
    result = run("compose", adapter, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "the base with 4 trained tensors in it; 1 of its files rewritten, 0 linked, 0 copied" in result.stdout
    assert "a pure LoRA on that model" in result.stdout
    found = json.loads(run("compose", adapter, tmp_path / "out", "--copy", "--json").stdout)
    assert found["model"] == str(tmp_path / "out" / "model")
    assert found["rewritten"] == ["model.safetensors"]


@pytest.mark.parametrize("command", ["merge", "compose"])
def test_a_foreign_output_is_an_error_of_one_line(command, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    monkeypatch.setattr("sys.argv", ["mmpeft", command, str(adapter), str(tmp_path / "mine")])
    with pytest.raises(SystemExit) as error:
        main.main()
    assert error.value.code == 1
    assert "it holds notes.txt, which is not of an earlier export" in capsys.readouterr().err
