import json
import random

import numpy as np
import pytest
from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data.chat import control_tokens
from mmpeft.data.check import Report, check_data, count_lines
from mmpeft.data.checks.prints import NearTable, Place, PlaceTable, difference_hash
from mmpeft.data.dataset import load_dataset
from mmpeft.data.formats import describe
from mmpeft.families.registry import family_of
from tests.data.files import colour_set, gpt, human, picture, row, write_json, write_lines
from tests.data.films import film, recording
from tests.data.test_dataset import broken_png
from tests.families.models import MODELS
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
        f"{path}:1: sample 0 (id 'a'): picture 'long.png' is 200 x 10, an extreme shape",
        f"{path}:2: sample 1 (id 'a'): the same id as sample 0 in line 1",
        f"{path}:3: sample 2 (id 'b'): the same pictures and conversation as sample 1 in line 2",
        f"{path}:4: sample 3 (id 'c'): the answer of turn 1 begins or ends with white space",
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
    assert report.found == {"looks held out": 1, "leak": 1}
    assert report.errors == [
        f"{path}:3: sample 2 (id 'a.png'): the same pictures and question as sample 0 in line 1 of {held}; "
        "remove one of them"
    ]
    assert report.warnings == [
        f"{path}:1: sample 0 (id 'a.jpg'): picture 'a.jpg' looks like 'held.png' of {held} (1 of 64 bits differ); "
        "leave it out of one of the two"
    ]


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
    assert report.warnings == [
        f"{path}:2: 4 of 4 samples are longer than 30 tokens (here first; the longest, of 50, in line 44): "
        "training cuts their ends off"
    ]


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


def test_what_was_left_out_of_pictures_is_a_warning_of_the_line_that_names_them_first(tmp_path):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "b.png")
    rows = [row(id="0"), row(human("q"), gpt("b"), id="1", image="a.gif"), row(image="b.png", id="2")]
    rows += [row(human("r"), gpt("a"), id="3", image="a.gif")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    report = check_data(path)
    assert (report.samples, report.found) == (4, {"animation": 1, "transparency": 1})
    assert report.warnings == [
        f"{path}:2: sample 1 (id '1'): picture 'a.gif' has 2 frames; the first is used",
        f"{path}:3: sample 2 (id '2'): picture 'b.png' is transparent in places; white lies behind it",
    ]


def test_rows_before_a_fault_of_the_file_are_checked(tmp_path):
    path = write_json(tmp_path / "a.json", [row(id="a"), {"id": "bad"}, row(id="c"), row(id="d")])
    path.write_text(path.read_text()[:-60])
    report = check_data(path)
    assert report.samples == 2
    assert [message.split(": ")[1].split(" ")[0] for message in report.errors] == ["sample", "the"]


def test_the_same_picture_under_another_name_is_a_duplicate(tmp_path):
    for name in ("a.png", "b.bmp", "c.png"):
        noise(1 if name != "c.png" else 2).save(tmp_path / name)
    path = write_lines(tmp_path / "a.jsonl", [row(id=name, image=name) for name in ("a.png", "b.bmp", "c.png")])
    assert check_data(path).warnings == [
        f"{path}:2: sample 1 (id 'b.bmp'): the same pictures and conversation as sample 0 in line 1"
    ]
    assert not check_data(path, open_media=False).warnings


def test_one_answer_in_several_spellings_is_a_warning(tmp_path):
    answers = ["yes"] * 12 + ["Yes."] * 4 + ["no"] * 10
    rows = [row(human(f"q{number}"), gpt(answer)) for number, answer in enumerate(answers)]
    assert [message.split(": ", 1)[1] for message in check_data(write_lines(tmp_path / "a.jsonl", rows)).warnings] == [
        "short answers differ by letters' case or by stops alone: 'yes' (12), 'Yes.' (4); write them all alike"
    ]


def test_a_picture_that_lies_there_under_a_name_much_like_it_is_named(tmp_path):
    picture(tmp_path / "deep" / "a.png")
    wanted = ["deep\\a.png", "deep/a.jpg", "deep/a.PNG"]
    report = check_data(write_lines(tmp_path / "a.jsonl", [row(image=name) for name in wanted]))
    assert len(report.errors) == 3
    assert all("; there is 'deep/a.png': write that" in message for message in report.errors)


@pytest.mark.parametrize("family", ["qwen2_5_omni", "qwen3_vl", "qwen2_audio", "smolvlm"])
def test_lengths_in_tokens_are_those_of_training_whatever_the_medium(tmp_path, family):
    model, reader = MODELS[family]()
    noise(1).save(tmp_path / "a.png")
    film(tmp_path / "b.mp4", frames=40)
    recording(tmp_path / "c.wav", seconds=1.234)
    names = {"image": "a.png", "video": "b.mp4", "audio": "c.wav"}
    rows = [
        row(human(f"<{key}>\nWhat is it?"), gpt("It is red."), id=key, **{key: names[key]})
        for key in family_of(model).modalities
        if key in names and key in control_tokens(reader).media
    ]
    assert rows
    for item in rows:
        path = write_lines(tmp_path / f"{item['id']}.jsonl", [item])
        (encoded,) = load_dataset(path, processor=reader)
        length = len(encoded["input_ids"])
        report = check_data(path, processor=reader, max_length=length - 1)
        assert report.lengths["max"] == length, item["id"]
        assert (report.lengths["cut"], report.errors) == (1, [])
        assert load_dataset(path, processor=reader, max_length=length - 1, verify="decode").truncated == 1
        report = check_data(path, processor=reader, max_length=10)
        assert report.found["cut"] == 2
        assert f"no answer token is left of its {length} tokens after the cut to max_length 10" in report.errors[0]
        with pytest.raises(DataError, match="no answer token is left"):
            load_dataset(path, processor=reader, max_length=10, verify="decode")


def test_progress_is_told_in_rows_and_lines_up_to_the_end_of_the_file(tmp_path):
    path = write_json(tmp_path / "a.json", [row(id=str(number)) for number in range(600)])
    told = []
    check_data(path, on_progress=lambda done, line: told.append((done, line)))
    assert [done for done, _ in told] == [256, 512, 600]
    lines = count_lines(path)
    assert 0 < told[0][1] < told[1][1] < told[2][1] <= lines
    assert told[2][1] > 0.98 * lines
    assert count_lines(tmp_path) is None
