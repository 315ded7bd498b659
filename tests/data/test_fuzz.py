"""Whatever bytes a data file or a medium holds: either it is read, or a MMPeftError names the file; nothing else."""

import csv
import io
import json
import math
import tarfile
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmpeft.core.errors import MMPeftError
from mmpeft.data.audio import check_audio, load_audio
from mmpeft.data.box_text import read_boxes, write_box
from mmpeft.data.boxes import cropped, mirrored, pixel_values, relative_values
from mmpeft.data.check import check_data
from mmpeft.data.formats import read_rows
from mmpeft.data.media import FORMATS, check_image, load_with_notes, upright_sizes
from mmpeft.data.types import Box
from mmpeft.data.video import check_video, load_video
from tests.data.files import gpt, human, row
from tests.data.films import film, recording

# The same examples in every run: what is found once is found again.
PROFILE = {"derandomize": True, "deadline": None, "suppress_health_check": list(HealthCheck)}
QUICK, LONG = settings(**PROFILE, max_examples=60), settings(**PROFILE, max_examples=2000)
PARTS = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\n",
    b"\0",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"NaN",
    b"-",
]
NUMBERS = [bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x01", b"\x80"]


@st.composite
def mutated(draw, whole: bytes, parts: list[bytes]):
    """`whole` with a few places overwritten, cut out, doubled, or its end left out."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 30)))
        match draw(st.sampled_from(["overwrite", "insert", "cut out", "double", "cut off"])):
            case "overwrite":
                data[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
            case "insert":
                data[start:start] = draw(st.sampled_from(parts))
            case "cut out":
                del data[start:end]
            case "double":
                data[start:start] = data[start:end]
            case "cut off":
                del data[max(start, 1) :]
    return bytes(data)


def said(function):
    """The message of a MMPeftError that `function` raises; None if it raises none."""
    with warnings.catch_warnings():
        # PIL warns of odd metadata in files that it then reads.
        warnings.simplefilter("ignore")
        try:
            function()
        except MMPeftError as error:
            return str(error)
    return None


def data_file(path, data):
    """Rows of a file of any bytes, and what `data check` says of it."""
    path.write_bytes(data)
    message = said(lambda: list(read_rows(path)))
    assert message is None or str(path) in message
    report = check_data(path, open_media=False, workers=1)
    assert all(error.startswith(str(path)) for error in report.errors)
    assert report.errors or report.samples


ROWS = [
    row(human("<image>\nWhich colour is it, 猫?"), gpt("red\n"), id="s", image="a.png", n=[1.5e3, True, None]),
    row(),
]
WHOLE = {
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "a.jsonl": "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in ROWS).encode(),
}


@pytest.mark.parametrize("name", list(WHOLE))
@QUICK
@given(data=st.data())
def test_any_bytes_as_a_data_file(tmp_path_factory, name, data):
    data_file(tmp_path_factory.getbasetemp() / name, data.draw(st.binary(max_size=80) | mutated(WHOLE[name], PARTS)))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WHOLE))
@LONG
@given(data=st.data())
def test_any_bytes_as_a_data_file_at_length(tmp_path_factory, name, data):
    data_file(tmp_path_factory.getbasetemp() / name, data.draw(st.binary(max_size=80) | mutated(WHOLE[name], PARTS)))


def tables() -> dict[str, bytes]:
    """A small CSV, TSV, parquet and tar of samples."""
    columns = {"image": ["a.png", "b.png"], "question": ["Which?", "What, now?"], "answer": ["red", 'say "a"']}
    parquet, shard = io.BytesIO(), io.BytesIO()
    pq.write_table(pa.table(columns), parquet)
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for name, content in (("0.txt", b"red"), ("0.json", json.dumps(ROWS[1]).encode()), ("1.txt", b"green")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    texts = {}
    for name, delimiter in (("t.csv", ","), ("t.tsv", "\t")):
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows([list(columns), *zip(*columns.values(), strict=True)])
        texts[name] = text.getvalue().encode()
    return {**texts, "t.parquet": parquet.getvalue(), "t.tar": shard.getvalue()}


TABLES = tables()


@pytest.mark.parametrize("name", list(TABLES))
@QUICK
@given(data=st.data())
def test_any_bytes_as_a_table_or_archive(tmp_path_factory, name, data):
    data_file(tmp_path_factory.getbasetemp() / name, data.draw(mutated(TABLES[name], [*PARTS, *NUMBERS])))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLES))
@LONG
@given(data=st.data())
def test_any_bytes_as_a_table_or_archive_at_length(tmp_path_factory, name, data):
    data_file(tmp_path_factory.getbasetemp() / name, data.draw(mutated(TABLES[name], [*PARTS, *NUMBERS])))


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Small real files of every kind of medium, by name."""
    folder = tmp_path_factory.mktemp("media")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    for form in FORMATS:
        noise.save(folder / f"a.{form.lower()}", form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP") else {}))
    noise.convert("P").save(folder / "many.gif", save_all=True, append_images=[noise.rotate(90).convert("P")])
    noise.save(folder / "many.webp", save_all=True, append_images=[noise.rotate(90)])
    noise.convert("RGBA").save(folder / "many.png", save_all=True, append_images=[noise.rotate(90).convert("RGBA")])
    for suffix in ("wav", "flac", "ogg"):
        recording(folder / f"a.{suffix}", seconds=0.2)
    film(folder / "a.mp4", frames=6, sound=0.2)
    film(folder / "a.mkv", frames=6)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def medium(path, data):
    """All readers of a medium, over any bytes; both readers of a header and of the whole."""
    path.write_bytes(data)
    name, root = path.name, path.parent
    if path.suffix in (".wav", ".flac", ".ogg"):
        readers = (check_audio, load_audio)
    elif path.suffix in (".mp4", ".mkv"):
        readers = (check_video, load_video, check_audio, load_audio)
    else:
        readers = (check_image, upright_sizes, load_with_notes)
    for reader in readers:
        message = said(lambda reader=reader: reader(name, root=root))
        assert message is None or name in message


KINDS = [*(f"a.{form.lower()}" for form in FORMATS), "many.gif", "many.webp", "many.png"]
KINDS += ["a.wav", "a.flac", "a.ogg", "a.mp4", "a.mkv"]


@pytest.mark.parametrize("name", KINDS)
@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_any_bytes_as_a_medium(tmp_path_factory, media, name, data):
    medium(tmp_path_factory.getbasetemp() / name, data.draw(mutated(media[name], NUMBERS)))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@settings(LONG, max_examples=1000)
@given(data=st.data())
def test_any_bytes_as_a_medium_at_length(tmp_path_factory, media, name, data):
    medium(tmp_path_factory.getbasetemp() / name, data.draw(mutated(media[name], NUMBERS)))


SIZES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
ANY_BOXES = st.builds(
    Box,
    values=st.lists(st.floats() | st.integers(-10, 1000).map(float), max_size=5).map(tuple),
    picture=st.integers(0, 2),
    unit=st.sampled_from(["pixels", "fraction", "thousandths"]),
)
CONVENTIONS = st.sampled_from(["fraction", "thousandths", "resized_pixels", "location_tokens"])


@QUICK
@given(ANY_BOXES, SIZES, CONVENTIONS)
def test_any_box_is_written_or_refused(box, size, convention):
    for function in (
        lambda: relative_values(box, size=size),
        lambda: pixel_values(box, size=size),
        lambda: mirrored(box, size=size),
        lambda: cropped(box, size=size, window=(0, 0, *size)),
        lambda: write_box(box, size=size, resized=(28, 56), convention=convention),
    ):
        message = said(function)
        assert message is None or str(list(box.values)) in message
    if said(lambda: relative_values(box, size=size)) is None:
        text = write_box(box, size=size, resized=(280, 560), convention=convention)
        (found,) = read_boxes(f"It is {text}.", convention=convention, resized=(280, 560))
        near = 0.5 / 100
        assert all(
            math.isclose(one, other, abs_tol=near)
            for one, other in zip(found.values, relative_values(box, size=size), strict=True)
        )


@QUICK
@given(st.text(alphabet="[]()<>loc0123456789,.- e", max_size=60), CONVENTIONS)
def test_any_answer_is_searched_for_boxes(text, convention):
    for box in read_boxes(text, convention=convention, resized=(28, 56)):
        assert all(0 <= value <= 1 for value in box.values)


def test_what_is_no_error_of_ours_is_not_swallowed():
    """The check of this file's checks."""
    with pytest.raises(ZeroDivisionError):
        said(lambda: 1 // 0)
