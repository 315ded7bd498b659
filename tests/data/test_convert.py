"""Every format from every other: what comes back is what went in, and what a format cannot hold is said."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmpeft.core.errors import DataError, OutputError
from mmpeft.data.convert import TARGETS, convert_data
from mmpeft.data.formats import describe, read_samples, source_root
from mmpeft.data.media import load_image
from mmpeft.data.roots import resolve_inside
from mmpeft.data.types import PLACEHOLDERS, Box, Sample, Turn
from mmpeft.data.writers.shapes import llava_row
from tests.data.files import gpt, human, picture, row, write_json, write_lines
from tests.data.sources.files import COLOURS, png

NAMES = {
    "llava": "out.json",
    "messages": "out.jsonl",
    "swift": "out.jsonl",
    "llamafactory": "out.json",
    "csv": "out.csv",
    "parquet": "out.parquet",
    "webdataset": "out",
    "folder": "out",
}
BY_NAME = tuple(name for name in TARGETS if name not in ("webdataset", "folder"))


def plain(samples):
    """Samples without their lines, which every container counts in its own way."""
    return [replace(sample, line=0) for sample in samples]


def text(**options):
    marks = [*PLACEHOLDERS.values(), "<box>", "<bbox>", "<ref-object>"]
    characters = st.characters(exclude_categories=["Cs"])
    return (
        st.text(characters, min_size=1, **options)
        .filter(lambda value: value.strip())
        .filter(lambda value: not any(mark in value for mark in marks))
    )


def paths():
    return st.lists(text(max_size=12).filter(lambda name: "://" not in name), max_size=2)


@st.composite
def samples(draw, pairs=1, boxes=False, system=True):
    """A sample with its media spread over its user turns."""
    turns = [Turn(role="system", text=draw(text()))] if system and draw(st.booleans()) else []
    media = {modality: draw(paths()) for modality in PLACEHOLDERS}
    marks = [PLACEHOLDERS[modality] for modality, names in media.items() for _ in names]
    placed = [draw(st.integers(0, pairs - 1)) for _ in marks]
    found = [
        Box(values=draw(values), picture=draw(st.integers(0, len(media["image"]) - 1)))
        for _ in range(draw(st.integers(0, 2)) if boxes and media["image"] else 0)
    ]
    for number in range(pairs):
        shown = [mark for mark, place in zip(marks, placed, strict=True) if place == number]
        pieces = [draw(text()), *(piece for mark in shown for piece in (mark, draw(text())))]
        turns.append(Turn(role="user", text="".join(pieces)))
        last = "<box>" * len(found) if number == pairs - 1 else ""
        turns.append(Turn(role="assistant", text=draw(text()) + last))
    return Sample(
        id=draw(text()),
        turns=tuple(turns),
        images=tuple(media["image"]),
        videos=tuple(media["video"]),
        audios=tuple(media["audio"]),
        boxes=tuple(found),
        kind=draw(st.one_of(st.just(""), text())),
        index=0,
        line=0,
    )


values = st.tuples(*[st.floats(0, 1e6)] * 2, *[st.floats(1e6, 1e9)] * 2)
CAN = {
    "llava": samples(pairs=2, boxes=True),
    "messages": samples(pairs=2, boxes=True),
    "swift": samples(pairs=2, boxes=True),
    "llamafactory": samples(pairs=2),
    "csv": samples(system=False),
    "parquet": samples(pairs=2, boxes=True),
}


@pytest.mark.parametrize("to", BY_NAME)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_converted_and_back_is_what_it_was(tmp_path_factory, to, data):
    folder = tmp_path_factory.mktemp("round")
    given_samples = data.draw(st.lists(CAN[to], min_size=1, max_size=3))
    rows = [llava_row(sample) for sample in given_samples]
    path = write_json(folder / "in.json", rows)
    expected = plain(read_samples(path))
    assert expected == [replace(sample, index=number) for number, sample in enumerate(given_samples)]
    convert_data(path, folder / "there" / NAMES[to], to)
    assert plain(read_samples(folder / "there" / NAMES[to])) == expected
    convert_data(folder / "there" / NAMES[to], folder / "back.jsonl", "llava")
    assert plain(read_samples(folder / "back.jsonl")) == expected


def bytes_of(path):
    root, found = source_root(path), []
    for sample in read_samples(path):
        for name in (name for names in sample.media.values() for name in names):
            with resolve_inside(name, root=root, kind="medium").open("rb") as file:
                found.append(file.read())
    return found


def without_media(samples):
    return [replace(sample, images=(), videos=(), audios=(), line=0) for sample in samples]


@pytest.mark.parametrize("to", ["webdataset", "folder"])
def test_media_are_taken_along(tmp_path, to):
    source = tmp_path / "in"
    for colour in COLOURS:
        picture(source / f"{colour}.png", colour=colour)
    (source / "s.wav").write_bytes(b"RIFF\0\0\0\0WAVEfmt sound")
    rows = [row(human(f"<image>{c}?"), gpt(c), id=c, image=f"{c}.png", kind="colour") for c in COLOURS]
    rows.append(row(human("<audio>hm"), gpt("a"), id="w", audio="s.wav"))
    if to == "webdataset":
        two = row(human("<image>1<image>"), gpt("a"), human("<audio>2"), gpt("<box>"), system="s", boxes=[[1, 2, 3, 4]])
        rows += [two | {"images": ["blue.png", "red.png"], "audio": "s.wav"}, row()]
    path = write_json(source / "in.json", rows)
    done = convert_data(path, tmp_path / "out", to)
    assert (done.samples, done.media_root) == (len(rows), str(tmp_path / "out"))
    assert without_media(read_samples(tmp_path / "out")) == without_media(read_samples(path))
    assert bytes_of(tmp_path / "out") == bytes_of(path)
    convert_data(tmp_path / "out", tmp_path / "back.json", "llava")
    assert without_media(read_samples(tmp_path / "back.json")) == without_media(read_samples(path))


def test_embedded_media_find_their_ending(tmp_path):
    picture(tmp_path / "a.dat.png").rename(tmp_path / "a.dat")
    write_lines(tmp_path / "in.jsonl", [row(human("<image>q"), gpt("a"), image="a.dat")])
    convert_data(tmp_path / "in.jsonl", tmp_path / "out", "folder")
    assert (tmp_path / "out/00000000.png").read_bytes() == png("red")
    (tmp_path / "a.dat").write_bytes(b"what is this?")
    with pytest.raises(DataError, match=r"in\.jsonl:1: sample 0 .*: picture 'a\.dat' is of a kind that is not known"):
        convert_data(tmp_path / "in.jsonl", tmp_path / "two", "folder")
    assert not (tmp_path / "two").exists()


def test_several_shards_are_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft.data.writers.folders.SHARD_SAMPLES", 2)
    path = write_lines(tmp_path / "in.jsonl", [row(id=str(number)) for number in range(5)])
    convert_data(path, tmp_path / "out", "webdataset")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [f"shards-00000{n}.tar" for n in range(3)]
    assert [sample.id for sample in read_samples(tmp_path / "out")] == list("01234")


CANNOT = {
    "csv": [
        ([human("a"), gpt("b"), human("c"), gpt("d")], {}, "it has 4 turns; a row of question and answer holds one"),
        ([{"from": "system", "value": "s"}, human("a"), gpt("b")], {}, "it has a system turn"),
        ([human("<image>"), gpt("<box>")], {"image": "a", "boxes": [[1, 2]]}, "it holds boxes"),
        ([human("a" * 200_000), gpt("b")], {}, "its question has 200000 characters; a cell of a table holds"),
    ],
    "folder": [([human("a"), gpt("b")], {}, "it has 0 media; a folder's row holds one")],
    "llamafactory": [([human("<image>"), gpt("<box>")], {"image": "a", "boxes": [[1, 2]]}, "it holds boxes")],
    "swift": [
        (
            [human("<image>"), gpt("<box>")],
            {"image": "a", "boxes": [[1, 2]], "box_unit": "thousandths"},
            "count thousandths",
        ),
        (
            [human("<image>a <bbox>"), gpt("<box>")],
            {"image": "a", "boxes": [[1, 2]]},
            "holds <bbox> or <ref-object> as",
        ),
    ],
    "messages": [([human("<image>"), gpt("b")], {"image": "http://x/a.png"}, "is a URL, and URLs are off")],
    "webdataset": [([human("<image>"), gpt("b")], {"image": "../a.png"}, "lies outside the media root")],
    "llava": [([human("<image>"), gpt(" ")], {"image": "a"}, "turn 1 (from gpt) has an empty text")],
}


@pytest.mark.parametrize(("to", "case"), [(to, case) for to, cases in CANNOT.items() for case in cases])
def test_what_a_format_cannot_hold_names_the_row_and_writes_nothing(tmp_path, to, case):
    turns, fields, message = case
    path = write_lines(tmp_path / "in.jsonl", [row(id="good"), row(*turns, **fields, id="bad")])
    if to == "folder":
        path = write_lines(tmp_path / "in.jsonl", [row(*turns, **fields, id="bad")])
    out = tmp_path / "new" / NAMES[to]
    with pytest.raises(DataError) as caught:
        convert_data(path, out, to)
    assert message in str(caught.value)
    assert "(id 'bad')" in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert not out.exists()


def test_keys_that_are_not_known_are_counted(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [row(source="web"), row(source="web", score=1), row()])
    assert convert_data(path, tmp_path / "out.jsonl", "llava").ignored == {"source": 2, "score": 1}
    assert convert_data(path, tmp_path / "out.csv", "csv").ignored == {"source": 2, "score": 1}


def test_columns_and_question_are_those_of_the_reader(tmp_path):
    (tmp_path / "in.csv").write_text("bild,text\na.png,red\n")
    convert_data(tmp_path / "in.csv", tmp_path / "out.json", "llava", columns={"image": "bild"}, question="Colour?")
    (sample,) = read_samples(tmp_path / "out.json")
    assert (sample.turns[0].text, sample.images) == ("<image>\nColour?", ("a.png",))


def test_dataset_info_keeps_its_other_entries(tmp_path):
    other = {"file_name": "other.json", "columns": {"prompt": "p"}}
    write_json(tmp_path / "dataset_info.json", {"out": other, "mine": {"file_name": "mine.json"}})
    path = write_lines(tmp_path / "in.jsonl", [row(human("<image>q"), gpt("a"), image="a.png")])
    for name in ("out.json", "mine.json"):
        done = convert_data(path, tmp_path / name, "llamafactory")
    assert done.files == [str(tmp_path / "mine.json"), str(tmp_path / "dataset_info.json")]
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert (info["out"], info["out.json"]["file_name"], info["mine"]["columns"]["images"]) == (
        other,
        "out.json",
        "images",
    )
    assert describe(tmp_path / "mine.json").why == "dataset_info.json beside it says so, under mine"
    (tmp_path / "dataset_info.json").write_text("[")
    with pytest.raises(OutputError, match=r"dataset_info\.json: cannot be read"):
        convert_data(path, tmp_path / "third.json", "llamafactory")
    assert not (tmp_path / "third.json").exists()


def test_nothing_that_is_there_is_lost(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", [row()])
    picture(tmp_path / "full/a.png")
    for out, to, message in (
        ("in.jsonl", "llava", "is the source"),
        ("out.txt", "llava", r"expected a name that ends in \.json or \.jsonl for llava"),
        ("full", "webdataset", "is a folder that holds files"),
        ("in.jsonl", "folder", "is the source"),
        ("full/a.png", "folder", "is a file; folder needs the name of a new folder"),
    ):
        with pytest.raises(OutputError, match=message):
            convert_data(path, tmp_path / out, to)
    with pytest.raises(DataError, match="found the target 'lava'; did you mean 'llava'"):
        convert_data(path, tmp_path / "a.json", "lava")
    assert load_image("full/a.png", root=tmp_path).size == (16, 12)
    write_lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="holds no sample"):
        convert_data(tmp_path / "empty.jsonl", tmp_path / "a.json", "llava")
