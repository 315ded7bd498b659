import json

from mmpeft.data.check import Report, check_data
from tests.data.files import colour_set, gpt, human, picture, row, write_json, write_lines
from tests.data.test_dataset import broken_png


def test_a_good_file_is_counted(tmp_path):
    report = check_data(colour_set(tmp_path, count=4))
    assert report == Report(samples=4, pictures=3, turns=8, kinds={"": 3, "sum": 1})


def test_every_fault_of_rows_and_pixels_is_an_error(tmp_path):
    broken_png(tmp_path / "broken.png")
    rows = [row(image="broken.png", id="x"), {"id": "y"}, row(images=["a", "b"]), row(image="no.png"), row()]
    path = write_lines(tmp_path / "a.jsonl", rows)
    report = check_data(path)
    assert report.samples == 1
    assert len(report.errors) == 4
    assert report.errors[0].startswith(f"{path}:1: sample 0 (id 'x'): picture 'broken.png' is corrupt or truncated")
    assert report.errors[1].startswith(f"{path}:2: sample 1 (id 'y'): no `conversations`")
    assert report.errors[2].startswith(f"{path}:3: sample 2: 2 pictures but 0 <image>")
    assert report.errors[3].startswith(f"{path}:4: sample 3 (id '3'): picture 'no.png' does not exist")


def test_a_file_that_is_cut_off_is_an_error_after_what_could_be_read(tmp_path):
    path = write_json(tmp_path / "a.json", [row(id=f"s{number}") for number in range(3)])
    path.write_text(path.read_text()[:-60])
    report = check_data(path)
    assert "the file ends in the middle of sample 2" in report.errors[0]
    assert check_data(tmp_path / "none.json").errors == [
        f"{tmp_path / 'none.json'}: no such file; data files beside it: a.json"
    ]
    assert check_data(write_json(tmp_path / "b.json", [])).errors == [f"{tmp_path / 'b.json'}: holds no sample"]


def test_what_may_not_be_meant_is_a_warning(tmp_path):
    picture(tmp_path / "long.png", size=(200, 10))
    rows = [
        row(id="a", image="long.png"),
        row(id="a"),
        row(id="b"),
        row(human("q"), gpt(" a"), id="c", source="web"),
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    report = check_data(path)
    assert (report.errors, report.samples) == ([], 4)
    assert report.warnings == [
        f"{path}:2: sample 1 (id 'a'): the same id as sample 0 in line 1",
        f"{path}:3: sample 2 (id 'b'): the same pictures and conversation as sample 1 in line 2",
        f"{path}:4: sample 3 (id 'c'): the answer of turn 1 begins or ends with white space",
        f"{path}: picture 'long.png' is 200 x 10, an extreme shape",
        f"{path}:4: the key 'source' is not known and not used (here first)",
    ]


def test_a_sample_that_stands_twice_is_found_in_a_file_of_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row(id="a"), row(id="a")]))
    assert check_data(path).warnings == [
        f"{path}:1: sample 1 (id 'a'): the same id as sample 0 in line 1",
        f"{path}:1: sample 1 (id 'a'): the same pictures and conversation as sample 0 in line 1",
    ]
