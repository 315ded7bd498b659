"""Containers other than JSON: what their rows become, that their media open, and what is said of damaged ones."""

import json
import os
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from mmpeft.core.errors import DataError
from mmpeft.data.arrow import cached_rows, row_of
from mmpeft.data.convert import convert_data
from mmpeft.data.dataset import load_dataset
from mmpeft.data.formats import describe, is_source, read_rows, read_samples, source_root
from mmpeft.data.media import load_image
from mmpeft.data.mend import mend_data
from mmpeft.data.sources.columnar import BATCH
from tests.data.files import gpt, human, picture, row, write_lines
from tests.data.sources.files import COLOURS, png, tar
from tests.tiny import tiny_processor


def said(sample):
    return [turn.text for turn in sample.turns]


def colours(path):
    """The colour of each sample's picture, opened under the source's own root."""
    root = source_root(path)
    return [load_image(name, root=root).getpixel((0, 0)) for sample in read_samples(path) for name in sample.images]


RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


class TestTables:
    def test_records_know_the_line_where_they_start(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text('image,question,answer\r\n"a.png","Which\r\n\r\none?",7\r\n\r\nb.png,"say ""hi""",hi\r\n')
        samples = list(read_samples(path))
        assert [(sample.line, said(sample)) for sample in samples] == [
            (2, ["<image>\nWhich\r\n\r\none?", "7"]),
            (6, ['<image>\nsay "hi"', "hi"]),
        ]
        assert str(describe(path)) == "question and answer columns in CSV (rows hold `question`, `answer`)"

    @pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ",")])
    def test_other_separators_are_seen(self, tmp_path, name, mark):
        path = tmp_path / name
        path.write_text(f"question{mark}answer\n1 + 1{mark}2\n")
        assert [said(sample) for sample in read_samples(path)] == [["1 + 1", "2"]]

    def test_empty_cells_lists_and_unnamed_columns(self, tmp_path):
        path = tmp_path / "a.csv"
        path.write_text(',images,question,answer,kind\n0,"[""a"",""b""]",<image><image>q,a,\n1,,q,a,k\n', "utf-8-sig")
        first, second = read_samples(path)
        assert (first.images, first.kind, second.images, second.kind) == (("a", "b"), "", (), "k")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the file is empty; expected a line of column names"),
            ("question,question\n", "two columns are named 'question'"),
            ("question,,answer\n", "column 2 has no name"),
            ('question,answer\nq,"a\n', "a.csv:2: is no whole record: unexpected end of data"),
            ("question,antwort\nq,a\n", "a.csv:2: rows hold `question`, `antwort`, which is no layout"),
        ],
    )
    def test_a_table_that_is_none_is_named(self, tmp_path, text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(DataError, match=re.escape(message)):
            list(read_rows(tmp_path / "a.csv"))

    def test_other_encodings_are_named(self, tmp_path):
        (tmp_path / "a.csv").write_bytes(b"question,answer\nq,\xe9\n")
        with pytest.raises(DataError, match="not UTF-8"):
            list(read_rows(tmp_path / "a.csv"))

    def test_a_line_without_end_is_not_read_whole(self, tmp_path, monkeypatch):
        monkeypatch.setattr("mmpeft.data.sources.tables.MAX_LINE", 30)
        (tmp_path / "a.csv").write_text("question,answer\nq,a\nq," + "a" * 40 + "\n")
        with pytest.raises(DataError, match=r"a\.csv:3: a line of more than 30 characters; is it a table"):
            list(read_rows(tmp_path / "a.csv"))

    def test_a_record_of_another_length_is_a_problem_of_its_own(self, tmp_path):
        (tmp_path / "a.csv").write_text('question,answer,images\nq,a,\nq,a,b,c\nq,a,"[1"\n')
        rows = list(read_rows(tmp_path / "a.csv"))
        assert "4 cells for 3 columns; quote texts" in rows[1].problem.reason
        assert (rows[1].problem.line, "under `images` is no valid JSON" in rows[2].problem.reason) == (3, True)

    def test_only_json_is_mended(self, tmp_path):
        (tmp_path / "a.csv").write_text("question,answer\nq,a\n")
        with pytest.raises(
            DataError, match="is CSV; expected JSON or JSON Lines: write it so with `mmpeft data convert`"
        ):
            mend_data(tmp_path / "a.csv", tmp_path / "b.json")


def embedded(colour, path="x.png"):
    return {"bytes": png(colour), "path": path}


class TestParquet:
    @pytest.fixture
    def path(self, tmp_path):
        columns = {
            "image": [embedded(colour) for colour in COLOURS],
            "question": ["Which colour?"] * 3,
            "answer": list(COLOURS),
        }
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
        return tmp_path / "a.parquet"

    def test_embedded_pictures_are_found_again(self, path):
        samples = list(read_samples(path))
        assert [sample.images for sample in samples] == [(f"a.parquet::image[{number}]",) for number in range(3)]
        assert colours(path) == [RED, GREEN, BLUE]

    def test_lists_binary_and_paths(self, tmp_path):
        two = [[embedded("red"), embedded("green")]]
        pq.write_table(
            pa.table({"images": two, "question": ["<image><image>q"], "answer": ["a"]}), tmp_path / "a.parquet"
        )
        assert colours(tmp_path / "a.parquet") == [RED, GREEN]
        pq.write_table(pa.table({"image": [png("blue")], "text": ["a"]}), tmp_path / "b.parquet")
        assert colours(tmp_path / "b.parquet") == [BLUE]
        only_path = [{"bytes": None, "path": "c.png"}]
        pq.write_table(pa.table({"image": only_path, "text": ["a"]}), tmp_path / "c.parquet")
        assert next(read_samples(tmp_path / "c.parquet")).images == ("c.png",)

    def test_conversations_are_rows_like_those_of_json(self, tmp_path):
        rows = [row(human("q"), gpt("a"), id="x", image=None), row(human("<image>q"), gpt("a"), image="a.png")]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        assert [sample.images for sample in read_samples(tmp_path / "a.parquet")] == [(), ("a.png",)]

    def test_a_renamed_copy_has_an_entry_of_its_own(self, path, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        copy = path.with_name("b.parquet")
        copy.write_bytes(path.read_bytes())
        first, digest = cached_rows(path)
        second, same = cached_rows(copy)
        assert digest == same
        assert [row_of(rows[1]).sample.images[0] for rows in (first, second)] == [
            "a.parquet::image[1]",
            "b.parquet::image[1]",
        ]
        asked, _ = cached_rows(path, columns={"question": "answer", "answer": "question"})
        assert row_of(asked[0]).sample.turns[1].text == "Which colour?"

    def test_memory_is_that_of_some_rows_not_of_the_file(self, tmp_path):
        schema = pa.schema({"image": pa.binary(), "text": pa.string()})
        with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
            for _ in range(30):
                rows = [{"image": os.urandom(20_000), "text": "t"} for _ in range(BATCH)]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        before, most = pa.total_allocated_bytes(), 0
        for _ in read_rows(tmp_path / "a.parquet"):
            most = max(most, pa.total_allocated_bytes() - before)
        assert most < 8_000_000 < (tmp_path / "a.parquet").stat().st_size / 4

    def test_a_row_group_that_is_too_large_is_refused(self, path, tmp_path, monkeypatch):
        monkeypatch.setattr("mmpeft.data.embedded.MAX_ROW_GROUP", 100)
        for read in (lambda: list(read_rows(path)), lambda: load_image("a.parquet::image[0]", root=tmp_path)):
            with pytest.raises(DataError, match=r"row group 0 has \d+ bytes; at most 100 are read"):
                read()

    def test_damage_is_named(self, path, tmp_path):
        (tmp_path / "b.parquet").write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"b\.parquet: cannot be read"):
            list(read_rows(tmp_path / "b.parquet"))
        for member in ("image[7]", "other[0]", "image", "answer[0]"):
            with pytest.raises(DataError, match=re.escape(f"a.parquet::{member}")):
                load_image(f"a.parquet::{member}", root=tmp_path)

    def test_a_folder_of_parquet_files_is_read_in_order(self, path, tmp_path):
        folder = tmp_path / "set/data"
        folder.mkdir(parents=True)
        for number in (1, 0):
            (folder / f"train-{number}.parquet").write_bytes(path.read_bytes())
        assert colours(tmp_path / "set") == [RED, GREEN, BLUE] * 2
        assert [item.line for item in read_samples(tmp_path / "set")] == [1, 2, 3, 4, 5, 6]
        (folder / "test-0.parquet").write_bytes(path.read_bytes())
        with pytest.raises(DataError, match="holds files of several names"):
            list(read_rows(tmp_path / "set"))


class TestFolder:
    @pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
    def test_metadata_names_the_captions(self, tmp_path, name):
        picture(tmp_path / "in/a.png")
        line = '{"file_name": "a.png", "text": "a red one"}\n'
        (tmp_path / "in" / name).write_text(line if name.endswith("l") else "file_name,text\na.png,a red one\n")
        assert [said(sample) for sample in read_samples(tmp_path)] == [["<image>\nDescribe the picture.", "a red one"]]
        assert colours(tmp_path) == [RED]

    def test_text_files_are_captions(self, tmp_path):
        picture(tmp_path / "a.png")
        picture(tmp_path / "deep/b.png", colour="blue")
        picture(tmp_path / "c.png")
        (tmp_path / "a.txt").write_text(" red\n")
        (tmp_path / "deep/b.txt").write_text("blue")
        good, bad, deep = read_rows(tmp_path, question="Colour?")
        assert (good.sample.id, said(good.sample)) == ("a", ["<image>\nColour?", "red"])
        assert "'c.png' has no caption; write c.txt beside it" in bad.problem.reason
        assert (deep.sample.id, deep.sample.images) == ("deep/b", ("deep/b.png",))

    def test_captions_and_pictures_are_not_taken_from_elsewhere(self, tmp_path):
        root = tmp_path / "root"
        picture(root / "a.png")
        (tmp_path / "secret.txt").write_text("secret")
        (root / "a.txt").symlink_to(tmp_path / "secret.txt")
        (found,) = read_rows(root)
        assert "is a link that leads out" in found.problem.reason
        (tmp_path / "metadata.jsonl").write_text("")
        (root / "metadata.jsonl").symlink_to(tmp_path / "metadata.jsonl")
        with pytest.raises(DataError, match="is a link that leads out"):
            list(read_rows(root))

    def test_class_folders_are_used_only_where_nothing_else_is_said(self, tmp_path):
        picture(tmp_path / "cat/a.png")
        picture(tmp_path / "dog/b.png")
        assert [said(sample) for sample in read_samples(tmp_path)] == [
            ["<image>\nWhat is in the picture?", "cat"],
            ["<image>\nWhat is in the picture?", "dog"],
        ]
        assert "no captions, so the folders' names are the answers: cat, dog" in str(describe(tmp_path))
        picture(tmp_path / "c.png")
        with pytest.raises(DataError, match=r"holds 3 media without captions .*; expected metadata\.jsonl"):
            list(read_rows(tmp_path))

    def test_other_folders_say_what_is_expected(self, tmp_path):
        with pytest.raises(DataError, match="is a directory without data that is known; expected a file in it, or"):
            list(read_rows(tmp_path))
        write_lines(tmp_path / "train.jsonl", [row()])
        with pytest.raises(DataError, match=r"is a directory that holds train\.jsonl; name the file: .*/train\.jsonl"):
            list(read_rows(tmp_path))


class TestShards:
    def test_members_of_one_stem_are_a_sample(self, tmp_path):
        chat = {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]}
        tar(tmp_path / "t.tar", {"d": (tarfile.DIRTYPE, ""), "1.png": png("red"), "1.json": chat})
        (sample,) = read_samples(tmp_path / "t.tar")
        assert (sample.id, sample.images, said(sample)) == ("1", ("t.tar::1.png",), ["<image>q", "a"])
        tar(tmp_path / "u.tar", {"1.png": png("red"), "1.txt": "red\n", "2.txt": "blue", "2.jpg": png("blue")})
        assert colours(tmp_path / "u.tar") == [RED, BLUE]
        assert [said(sample)[1] for sample in read_samples(tmp_path / "u.tar")] == ["red", "blue"]

    @pytest.mark.parametrize("name", ["", "t-{000000..000001}.tar"])
    def test_shards_are_a_folder_or_a_pattern(self, tmp_path, name):
        for number, colour in enumerate(COLOURS[:2]):
            tar(tmp_path / f"t-00000{number}.tar", {f"{colour}.png": png(colour), f"{colour}.txt": colour})
        path = tmp_path / name if name else tmp_path
        assert colours(path) == [RED, GREEN]
        assert [(item.id, item.line) for item in read_samples(path)] == [("red", 1), ("green", 2)]
        assert "WebDataset (2 shards)" in str(describe(path))
        assert is_source(path)

    def test_pictures_stand_as_the_json_orders_them(self, tmp_path):
        talk = row(human("<image><image>"), gpt("a"), images=["x/2.b.png", "2.a.png"])
        tar(tmp_path / "t.tar", {"2.a.png": png("green"), "2.b.png": png("blue"), "2.json": talk})
        assert colours(tmp_path / "t.tar") == [BLUE, GREEN]
        tar(tmp_path / "t.tar", {"2.a.png": png("green"), "2.b.png": png("blue"), "2.json": talk | {"images": []}})
        assert colours(tmp_path / "t.tar") == [GREEN, BLUE]

    def test_links_broken_json_and_large_texts_are_problems_of_their_samples(self, tmp_path, monkeypatch):
        monkeypatch.setattr("mmpeft.data.sources.shards.MAX_TEXT", 20)
        members = {
            "0.png": png("red"),
            "0.txt": "red",
            "1.png": (tarfile.SYMTYPE, "/etc/passwd"),
            "1.txt": "x",
            "2.json": "{",
            "3.json": "[]",
            "4.json": " " * 30,
            "5.txt": b"\xff",
            "6.txt": "y",
        }
        found = list(read_rows(tar(tmp_path / "t.tar", members)))
        assert found[0].sample is not None
        reasons = [item.problem.reason for item in found[1:]]
        expected = [
            "holds the link or device '1.png'",
            "cannot be read",
            "is no object",
            "has 30 bytes",
            "cannot be read",
        ]
        assert [part in reason for part, reason in zip(expected, reasons, strict=False)] == [True] * 5
        assert "no picture; expected it under one of" in reasons[5]

    def test_what_is_no_set_of_shards_is_named(self, tmp_path):
        tar(tmp_path / "a-0.tar", {"1.txt": "x"})
        with pytest.raises(DataError, match=r"1 of 2 shards are not there: a-1\.tar"):
            list(read_rows(tmp_path / "a-{0..1}.tar"))
        with pytest.raises(DataError, match=r"counts 1\d* shards; expected 1 to"):
            list(read_rows(tmp_path / "a-{0..99999999}.tar"))
        (tmp_path / "b.tgz").write_bytes(b"")
        with pytest.raises(DataError, match="is compressed"):
            list(read_rows(tmp_path / "b.tgz"))
        (tmp_path / "c.tar").write_bytes(b"rubbish" * 99)
        with pytest.raises(DataError, match=r"c\.tar: is no whole tar archive"):
            list(read_rows(tmp_path / "c.tar"))
        with pytest.raises(DataError, match=r"several names \(a-#.tar, c.tar\)"):
            list(read_rows(tmp_path))


class TestSaved:
    @pytest.fixture
    def saved(self):
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["crimson", "lime", "navy"])}
        )
        columns = {"image": [{"bytes": png(colour), "path": None} for colour in COLOURS], "label": [0, 1, 2]}
        return datasets.Dataset.from_dict(columns, features=features)

    def test_a_saved_data_set_is_read_with_its_pictures_and_labels(self, saved, tmp_path):
        saved.save_to_disk(tmp_path / "set", num_shards=2)
        assert colours(tmp_path / "set") == [RED, GREEN, BLUE]
        assert [said(sample)[1] for sample in read_samples(tmp_path / "set")] == ["crimson", "lime", "navy"]

    def test_one_of_several_splits_must_be_named(self, saved, tmp_path):
        datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "one")
        assert len(list(read_rows(tmp_path / "one"))) == 3
        datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
        with pytest.raises(DataError, match=r"holds the splits train, test; name one: .*two/train"):
            list(read_rows(tmp_path / "two"))
        assert len(list(read_rows(tmp_path / "two/test"))) == 3

    def test_a_state_that_names_files_elsewhere_is_not_followed(self, saved, tmp_path):
        saved.save_to_disk(tmp_path / "set")
        state = json.loads((tmp_path / "set/state.json").read_text())
        (tmp_path / "set/state.json").write_text(
            json.dumps(state | {"_data_files": [{"filename": "../../etc/passwd"}]})
        )
        with pytest.raises(DataError, match=r"set/passwd: cannot be read"):
            list(read_rows(tmp_path / "set"))
        (tmp_path / "set/state.json").write_text("{}")
        with pytest.raises(DataError, match="is no whole saved data set"):
            list(read_rows(tmp_path / "set"))

    def test_a_hub_name_is_loaded_by_datasets(self, saved, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "me/set").mkdir(parents=True)
        saved.to_parquet(tmp_path / "me/set/train.parquet")
        saved.select([2]).to_parquet(tmp_path / "me/set/test.parquet")
        assert colours("hf://me/set") == [RED, GREEN, BLUE]
        assert colours("hf://me/set:test") == [BLUE]
        rows, _ = cached_rows("hf://me/set:test")
        assert row_of(rows[0]).sample.turns[1].text == "navy"
        with pytest.raises(DataError, match="correct the name or the split"):
            describe("hf://me/set:validation")

    def test_without_network_a_hub_name_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(DataError, match=r"hf://nobody/nothing: cannot be loaded .*the network is off"):
            describe("hf://nobody/nothing")
        with pytest.raises(DataError, match="is no hub data set; expected hf://owner/name"):
            describe("hf://a/b:train[:10]")


class TestTraining:
    """Every container goes the whole road, from its path to what the model takes."""

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.mark.parametrize("to", ["messages", "swift", "llamafactory", "csv", "parquet", "webdataset", "folder"])
    def test_a_converted_set_encodes_as_the_first_does(self, tmp_path, to):
        rows = [row(human("<image>\nColour?"), gpt(colour), id=colour, image=f"{colour}.png") for colour in COLOURS]
        for colour in COLOURS:
            picture(tmp_path / f"{colour}.png", colour=colour)
        path = write_lines(tmp_path / "in.jsonl", rows)
        ending = {"csv": ".csv", "parquet": ".parquet", "webdataset": "", "folder": ""}.get(to, ".json")
        out = tmp_path / f"out{ending}"
        convert_data(path, out, to)
        processor = tiny_processor()
        first, second = load_dataset(path, processor=processor), load_dataset(out, processor=processor)
        assert len(first) == len(second) == 3
        for number in range(3):
            for key, value in first[number].items():
                assert torch.equal(value, second[number][key]), key

    def test_embedded_pictures_are_encoded_in_workers(self, tmp_path):
        columns = {"image": [embedded(colour) for colour in COLOURS], "text": list(COLOURS)}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=1)
        dataset = load_dataset(tmp_path / "a.parquet", processor=tiny_processor())
        loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
        pixels = [sample["pixel_values"].mean(dim=(-2, -1)).flatten() for sample in loader]
        assert len(pixels) == 3
        assert not torch.allclose(pixels[0], pixels[1])

    @pytest.mark.parametrize("as_path", [str, Path])
    def test_saved_and_hub_data_sets_are_encoded(self, tmp_path, monkeypatch, as_path):
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        columns = {"image": [{"bytes": png(colour), "path": None} for colour in COLOURS], "text": list(COLOURS)}
        made = datasets.Dataset.from_dict(columns, features=features)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "me/set").mkdir(parents=True)
        made.to_parquet(tmp_path / "me/set/train.parquet")
        made.save_to_disk(tmp_path / "saved")
        for source in ("hf://me/set", "saved"):
            dataset = load_dataset(as_path(source), processor=tiny_processor())
            assert [dataset.sample(number).turns[1].text for number in range(3)] == list(COLOURS)
            assert "pixel_values" in dataset[2]
