"""What is cut, rated, split or weighted is named, where reading on would train on half of it or on the wrong half."""

import base64
import io
import json
import random
import tarfile

import av
import pytest
from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data.check import check_data
from mmpeft.data.formats import read_rows
from mmpeft.data.video import load_video
from tests.data.films import film


def problems(path):
    return [row.problem.reason for row in read_rows(path) if row.problem]


def written(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def chat(**answer):
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **answer}]}


def test_an_answer_of_weight_zero_is_refused(tmp_path):
    (reason,) = problems(written(tmp_path / "a.json", [chat(weight=1), chat(weight=0)]))
    assert "sets `weight` to 0; every answer is trained on alike" in reason


def test_answers_that_are_rated_are_refused(tmp_path):
    (reason,) = problems(written(tmp_path / "a.json", [chat(), {**chat(), "label": False}]))
    assert "it rates its answer (`label`, for KTO)" in reason


def test_objects_of_a_query_become_boxes(tmp_path):
    row = {
        "query": "<image>find <ref-object>",
        "response": "<bbox>",
        "images": ["a.png"],
        "objects": {"ref": ["the digit"], "bbox": [[1, 2, 30, 40]]},
    }
    (found,) = read_rows(written(tmp_path / "a.json", [row]))
    assert found.sample.turns[0].text == "<image>find the digit"
    assert found.sample.turns[1].text == "<box>"
    assert found.sample.boxes[0].values == (1, 2, 30, 40)


def test_a_folder_of_splits_is_no_source(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a.png")
        (tmp_path / split / "a.txt").write_text("a dog", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds the splits .*test.*train.*; give one of them, as in .*/test"):
        list(read_rows(tmp_path))
    assert not problems(tmp_path / "train")


def shard(path, samples=6):
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            for ending, data in (("TXT", b"a dog"), ("png", picture_bytes())):
                member = tarfile.TarInfo(f"{number:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path.read_bytes()


def picture_bytes(picture=None):
    buffer = io.BytesIO()
    (picture or Image.new("RGB", (8, 8))).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_shard_cut_between_two_samples_is_named(tmp_path):
    whole = shard(tmp_path / "a.tar")
    assert check_data(tmp_path).samples == 6  # and the endings may be capitals
    for cut in (2 * (512 + 512 + 512 + 512), 3 * 2048, 3 * 2048 + 100):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"a\.tar: is no whole tar archive after sample"):
            list(read_rows(tmp_path))


def test_half_a_matroska_film_is_named(tmp_path):
    film(tmp_path / "a.mp4", frames=100, rate=10)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "a.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    load_video("a.mkv", root=tmp_path, fps=2.0, max_frames=8)
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 3])
    with pytest.raises(DataError, match=r"'cut\.mkv' is truncated: its header says 10\.0 s"):
        load_video("cut.mkv", root=tmp_path, fps=2.0, max_frames=8)


def test_a_cell_may_hold_a_picture(tmp_path):
    noise = Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(256 * 256 * 3))
    url = "data:image/png;base64," + base64.b64encode(picture_bytes(noise)).decode()
    (tmp_path / "a.csv").write_text(f'image,question,answer\n"{url}",q,a\n', encoding="utf-8")
    (row,) = read_rows(tmp_path / "a.csv")
    assert row.sample.images == (url,)
    assert len(url) > 131_072
