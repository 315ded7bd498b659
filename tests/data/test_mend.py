import json

import pytest

from mmpeft.core.errors import DataError, OutputError
from mmpeft.data.check import check_data
from mmpeft.data.mend import count_changes, mend_data
from tests.data.files import gpt, human, picture, row, write_json, write_lines
from tests.data.films import recording


@pytest.mark.parametrize("name", ["out.json", "out.jsonl"])
def test_a_mended_file_passes_the_check_and_every_change_is_listed(tmp_path, name):
    for file in ("a.png", "b.png"):
        picture(tmp_path / file)
    rows = [
        row(human("<image>\nq"), gpt(" red \n"), id="0", image="a.png"),
        row(human("two"), gpt("a"), id="1", images=["a.png", "b.png"]),
        row(human("half \ud83d"), gpt("a"), id="2"),
        row(human("<image>\nq"), gpt("red"), id="3", image="a.png"),
        row(image="gone.png"),
        {"id": "no turns"},
        row(human("good"), gpt("这"), id="6", extra=1),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows) + "{broken\n")
    before = path.read_bytes()
    changes = mend_data(path, tmp_path / name)
    report = check_data(tmp_path / name)
    assert (report.errors, report.samples) == ([], 4)
    assert path.read_bytes() == before
    assert count_changes(changes) == {
        "white space trimmed": 1,
        "placeholder added": 1,
        "surrogate replaced": 1,
        "duplicate removed": 1,
        "sample dropped": 3,
    }
    assert json.loads((tmp_path / f"{name}.changes.json").read_text()) == changes
    assert changes[0] == {
        "line": 1,
        "index": 0,
        "change": "white space trimmed",
        "before": " red \n",
        "after": "red",
    }
    assert "'gone.png' does not exist" in next(change["why"] for change in changes if change["line"] == 5)


def test_what_could_be_read_of_a_cut_off_array_is_kept(tmp_path):
    path = write_json(tmp_path / "a.json", [row(human(f"q{number}"), id=str(number)) for number in range(3)])
    path.write_text(json.dumps([row(human(f"q{number}"), gpt("a")) for number in range(3)])[:-30])
    changes = mend_data(path, tmp_path / "b.json")
    assert len(json.loads((tmp_path / "b.json").read_text())) == 2
    assert "the rest of the file" in changes[0]["why"]
    assert "it was cut off" in changes[0]["why"]


def test_the_input_is_never_written_and_must_be_there(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row()])
    with pytest.raises(OutputError, match="is the file to be mended"):
        mend_data(path, tmp_path / "." / "a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        mend_data(tmp_path / "none.json", tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_a_sample_whose_film_or_recording_cannot_be_read_is_left_out(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film")
    recording(tmp_path / "b.wav", seconds=0.1)
    rows = [row(human("<video>q"), gpt("a"), video="a.mp4"), row(human("<audio>q"), gpt("a"), audio="b.wav")]
    changes = mend_data(write_lines(tmp_path / "a.jsonl", rows), tmp_path / "b.jsonl")
    assert [(change["line"], change["change"]) for change in changes] == [(1, "sample dropped")]
    assert check_data(tmp_path / "b.jsonl").samples == 1
    assert not check_data(tmp_path / "b.jsonl").errors
