import json

import pytest
from typer.testing import CliRunner

from mmpeft.cli.convert import Format
from mmpeft.cli.data import app
from mmpeft.core.errors import DataError
from mmpeft.data.convert import TARGETS
from mmpeft.data.formats import read_samples
from tests.data.files import colour_set, row, write_lines


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_target_can_be_asked_for():
    assert tuple(Format) == TARGETS


def test_what_was_read_and_written_is_said(tmp_path):
    path = colour_set(tmp_path)
    result = invoke("convert", path, tmp_path / "other/out.csv", "--to", "csv")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "read LLaVA/ShareGPT in JSON (rows hold `conversations`)",
        f"wrote 4 samples to {tmp_path}/other/out.csv",
        f"its media stay where they are: use it with media_root {tmp_path}",
    ]
    assert len(list(read_samples(tmp_path / "other/out.csv"))) == 4
    beside = invoke("convert", path, tmp_path / "out.jsonl", "--to", "swift")
    assert "media_root" not in beside.stdout


def test_columns_question_and_json(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [{"bild": "a.png", "worte": "rot", "more": 1}])
    options = ("--column", "image=bild", "--column", "caption=worte", "--question", "Farbe?", "--json")
    result = invoke("convert", path, tmp_path / "out.json", "--to", "llava", *options)
    assert result.exit_code == 0
    value = json.loads(result.stdout)
    assert (value["samples"], value["source"]["container"], value["ignored"]) == (1, "JSON Lines", {"more": 1})
    assert "warning: the key 'more' of 1 rows is not known and was not written" in result.stderr
    (sample,) = read_samples(tmp_path / "out.json")
    assert sample.turns[0].text == "<image>\nFarbe?"
    assert invoke("convert", path, tmp_path / "o.json", "--to", "llava", "--column", "image").exit_code == 2
    assert invoke("convert", path, tmp_path / "o.json", "--to", "lava").exit_code == 2


def test_a_row_that_does_not_fit_is_an_error(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [row(system="s")])
    with pytest.raises(DataError, match="it has a system turn"):
        raise invoke("convert", path, tmp_path / "out.csv", "--to", "csv").exception
    assert not (tmp_path / "out.csv").exists()
