import json
import random

import numpy as np
from PIL import Image

from mmpeft.data.check import Report, check_data
from mmpeft.data.checks.prints import NearTable, Place, PlaceTable, difference_hash
from mmpeft.data.formats import describe
from tests.data.files import colour_set, gpt, human, picture, row, write_json, write_lines
from tests.data.test_dataset import broken_png
from tests.tiny import tiny_processor


def test_a_good_file_is_counted(tmp_path):
    path = colour_set(tmp_path, count=4)
    report = check_data(path)
    assert report == Report(
        samples=4,
        pictures=3,
        turns=8,
        kinds={"": 3, "sum": 1},
        lengths={"unit": "characters", "min": 24, "median": 26, "p95": 29, "max": 29},
        answers={"red": 1, "green": 1, "blue": 1, "Two, that is 2.": 1},
        source=describe(path),
    )


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


def noise(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((96, 96))


def test_a_picture_that_looks_like_a_held_out_one_is_a_warning(tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 2), ("held.png", 1)):
        noise(seed).save(tmp_path / name)
    noise(1).resize((50, 50)).save(tmp_path / "a.jpg")
    path = write_lines(tmp_path / "a.jsonl", [row(id=name, image=name) for name in ("a.jpg", "b.png", "a.png")])
    held = write_lines(tmp_path / "held.jsonl", [row(id="h", image="held.png")])
    report = check_data(path, eval_path=held)
    assert (report.found["leak"], report.found["looks held out"]) == (1, 2)
    assert report.errors == [
        f"{path}:3: sample 2 (id 'a.png'): the same pictures and question as sample 0 in line 1 of {held}; "
        "remove one of them"
    ]
    assert "picture 'a.jpg' looks like 'held.png'" in report.warnings[0]


def test_near_hashes_are_found_and_far_ones_are_not():
    chance = random.Random(0)
    table, kept = NearTable(4), [chance.getrandbits(64) for _ in range(300)]
    for number, value in enumerate(kept):
        table.add(value, str(number))
    for number, value in enumerate(kept):
        for bits in range(7):
            flipped = value
            for bit in chance.sample(range(64), bits):
                flipped ^= 1 << bit
            assert table.find(flipped) == ((str(number), bits) if bits <= 4 else None)


def test_a_flat_picture_has_no_difference_hash():
    assert difference_hash(Image.new("RGB", (64, 64), "red")) is None
    assert difference_hash(noise(3)) is not None


def test_the_table_keeps_the_first_place_of_every_print():
    table = PlaceTable()
    chance = random.Random(0)
    values = list({chance.getrandbits(64) for _ in range(5000)} - {0})
    assert all(table.first(value, Place(index, index + 7)) is None for index, value in enumerate(values))
    assert all(table.first(value, Place(0, 0)) == Place(index, index + 7) for index, value in enumerate(values))


def test_messages_of_a_kind_are_bounded_and_counted(tmp_path):
    report = check_data(write_lines(tmp_path / "a.jsonl", [row(id=str(number), image="x") for number in range(80)]))
    assert (len(report.errors), report.error_count, report.found) == (50, 80, {"picture": 80})


def test_one_answer_nearly_everywhere_and_rare_ones_are_warnings(tmp_path):
    rows = [row(human(f"q{number}"), gpt("no" if number == 7 else "yes")) for number in range(30)]
    report = check_data(write_lines(tmp_path / "a.jsonl", rows))
    assert report.answers == {"yes": 29, "no": 1}
    assert "97% of 30 short answers are 'yes'" in report.warnings[0]
    assert "1 of 2 short answers stand under 3 times: 'no'" in report.warnings[1]


def test_lengths_in_tokens_count_every_picture_token(tmp_path):
    path = colour_set(tmp_path)
    report = check_data(path, processor=tiny_processor(), max_length=30)
    assert report.lengths["unit"] == "tokens"
    bare = check_data(path, processor=tiny_processor(), open_media=False)
    assert report.lengths["min"] - bare.lengths["min"] == 3
    assert report.lengths["cut"] == 4
    assert report.warnings == [f"{path}: 4 samples are longer than 30 tokens"]


def test_films_and_recordings_are_opened(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    rows = [row(human("<video>q"), gpt("a"), video="empty.mp4"), row(human("<audio>q"), gpt("a"), audio="no.wav")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    report = check_data(path)
    assert report.found == {"video": 1, "recording": 1}
    assert "'empty.mp4'" in report.errors[0]
    assert "'no.wav' does not exist" in report.errors[1]
    assert not check_data(path, open_media=False).errors


def test_sources_of_every_kind_are_checked_under_their_own_root(tmp_path):
    picture(tmp_path / "in/a.png")
    (tmp_path / "in/metadata.csv").write_text("file_name,text\na.png,red\n")
    report = check_data(tmp_path / "in")
    assert (report.errors, report.samples, report.pictures) == ([], 1, 1)
    assert report.source.container == "a folder with metadata"
    (tmp_path / "in/b.csv").write_text("bild,wort\na.png,rot\n")
    columns = {"image": "bild", "caption": "wort"}
    report = check_data(tmp_path / "in/b.csv", eval_path=tmp_path / "in/b.csv", columns=columns, question="Farbe?")
    assert [error.partition(": ")[2][:8] for error in report.errors] == ["sample 0"]
    assert check_data(tmp_path / "in/b.csv").source is None
