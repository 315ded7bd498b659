import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmpeft.core.errors import DataError
from mmpeft.data.dataset import load_dataset
from mmpeft.data.mixture import MixedDataset, Source, rows_of_epoch, samples_an_epoch
from tests.data.files import gpt, human, picture, row, write_json, write_lines


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def source(folder, name, count):
    return write_json(
        folder / f"{name}.json", [row(human(f"{name} {n}?"), gpt("a"), id=f"{name}{n}") for n in range(count)]
    )


def ids(dataset):
    return [dataset.sample(index).id for index in range(len(dataset))]


def epochs(size, weight, count, seed=0):
    shown = samples_an_epoch(size, weight)
    return [rows_of_epoch(size, shown, epoch=epoch, seed=seed, source=0).tolist() for epoch in range(count)]


@given(st.integers(1, 40), st.floats(0.01, 4), st.integers(0, 5))
def test_nothing_comes_up_again_before_everything_else_has(size, weight, seed):
    shown = samples_an_epoch(size, weight)
    stream = [index for rows in epochs(size, weight, 3 * -(-size // shown), seed) for index in rows]
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == list(range(size))
    assert all(len(rows) == shown for rows in epochs(size, weight, 3))


def test_a_weight_says_how_often_an_epoch_shows_each_sample():
    assert epochs(4, 1.0, 2) == [[0, 1, 2, 3]] * 2
    assert sorted(epochs(4, 2.0, 1)[0]) == [0, 0, 1, 1, 2, 2, 3, 3]
    first, second, third = epochs(10, 0.5, 3)
    assert sorted(first + second) == list(range(10))
    assert sorted(first) != sorted(third)
    assert [len(rows) for rows in epochs(10, 0.001, 2)] == [1, 1]
    assert epochs(10, 0.5, 3, seed=0) != epochs(10, 0.5, 3, seed=1)


def test_several_files_are_one_data_set(tmp_path, processor):
    a, b = source(tmp_path, "a", 3), source(tmp_path, "b", 4)
    dataset = load_dataset([a, {"path": b, "weight": 1.0}], processor=processor)
    assert isinstance(dataset, MixedDataset)
    assert ids(dataset) == ["a0", "a1", "a2", "b0", "b1", "b2", "b3"]
    assert [(part.name, part.weight, part.count) for part in dataset.parts] == [("a", 1.0, 3), ("b", 1.0, 4)]
    assert torch.equal(dataset[3]["input_ids"], load_dataset(b, processor=processor)[0]["input_ids"])
    assert torch.equal(dataset[-1]["input_ids"], dataset[6]["input_ids"])
    with pytest.raises(IndexError, match="sample 7 of 7"):
        dataset[7]


def test_an_epoch_has_other_samples_of_a_source_that_it_shows_a_part_of(tmp_path, processor):
    sources = [Source(path=source(tmp_path, "a", 4), weight=0.5), Source(path=source(tmp_path, "b", 2), weight=2)]
    dataset = load_dataset(sources, processor=processor, seed=3)
    assert len(dataset) == 6
    first = ids(dataset)
    dataset.set_epoch(1)
    assert dataset.epoch == dataset.parts[0].dataset.epoch == 1
    second = ids(dataset)
    assert sorted(first[:2] + second[:2]) == ["a0", "a1", "a2", "a3"]
    assert sorted(first[2:]) == sorted(second[2:]) == ["b0", "b0", "b1", "b1"]
    dataset.set_epoch(0)
    assert ids(dataset) == first
    assert ids(load_dataset(sources, processor=processor, seed=3)) == first


def test_workers_that_outlive_an_epoch_see_the_next(tmp_path, processor):
    dataset = load_dataset([{"path": source(tmp_path, "a", 8), "weight": 0.5}], processor=processor)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        want = [dataset[index]["input_ids"].tolist() for index in range(4)]
        seen.append([encoded["input_ids"].tolist() for encoded in loader])
        assert seen[-1] == want
    assert not any(ids in seen[0] for ids in seen[1])


def test_each_source_may_have_its_own_media_root(tmp_path, processor):
    picture(tmp_path / "one" / "p.png")
    picture(tmp_path / "two" / "p.png", size=(80, 20))
    paths = [write_lines(tmp_path / f"{name}.jsonl", [row(image="p.png")]) for name in "ab"]
    roots = [{"path": paths[0], "media_root": tmp_path / "one"}, {"path": paths[1]}]
    dataset = load_dataset(roots, media_root=tmp_path / "two", processor=processor)
    assert [part.dataset.media_root.name for part in dataset.parts] == ["one", "two"]
    assert "pixel_values" in dataset[0]


def test_errors_name_the_source(tmp_path, processor):
    good, bad = source(tmp_path, "good", 2), write_lines(tmp_path / "bad.jsonl", [row(image="no.png")])
    with pytest.raises(DataError, match=r"^source 'bad': .*bad\.jsonl:1: sample 0 .*'no\.png' does not exist"):
        load_dataset([good, bad], processor=processor)
    with pytest.raises(DataError, match=r"^source 'captions': .*no such file"):
        load_dataset([good, {"path": tmp_path / "gone.json", "name": "captions"}], processor=processor)
    picture(tmp_path / "p.png", size=(64, 64))
    late = write_lines(tmp_path / "late.jsonl", [row(image="p.png")])
    dataset = load_dataset([good, late], processor=processor)
    (tmp_path / "p.png").unlink()
    with pytest.raises(DataError, match=r"^source 'late': .*late\.jsonl:1: sample 0"):
        dataset[2]


def test_skipping_is_bounded_source_by_source(tmp_path, processor):
    bad = write_lines(tmp_path / "bad.jsonl", [row(id="x"), {"id": "y"}])
    dataset = load_dataset([source(tmp_path, "a", 9), bad], processor=processor, on_error="skip", max_skipped=1)
    assert [skipped.line for skipped in dataset.skipped] == [2]
    assert len(dataset) == 10
    with pytest.raises(DataError, match=r"source 'bad': .*max_skipped allows 0 of 2"):
        load_dataset([source(tmp_path, "a", 9), bad], processor=processor, on_error="skip", max_skipped=0.2)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "found no source; give at least one path"),
        ([{"path": "a.json", "wieght": 2}], "source 0: unknown field 'wieght'; did you mean 'weight'"),
        (["a.json", {"weight": 2}], "source 1: no `path`"),
        ([3], "source 0: found 3; expected a path, or a mapping"),
        ([{"path": "a.json", "weight": 0}], r"source 0 \(a.json\): weight 0; expected a number above 0"),
        ([{"path": "a.json", "weight": float("nan")}], "weight nan; expected"),
        ([{"path": "a.json", "name": "x"}, {"path": "b.json", "name": "x"}], "2 sources are named 'x'"),
        (["a.json", "a.json"], "2 sources are named 'a.json'"),
    ],
)
def test_what_is_no_list_of_sources_is_said(sources, message, processor):
    with pytest.raises(DataError, match=message):
        load_dataset(sources, processor=processor)


def test_files_of_one_stem_are_known_by_their_paths(tmp_path, processor):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    paths = [write_json(tmp_path / folder / "train.json", [row()]) for folder in "ab"]
    assert [part.name for part in load_dataset(paths, processor=processor).parts] == [str(path) for path in paths]


def test_tables_and_folders_are_sources_too(tmp_path, processor):
    (tmp_path / "tables").mkdir()
    table = tmp_path / "tables" / "fragen.csv"
    table.write_text("bild,frage,antwort\na.png,What is it?,a tree\n", encoding="utf-8")
    picture(tmp_path / "tables" / "a.png")
    captions = tmp_path / "captions"
    picture(captions / "b.png")
    (captions / "b.txt").write_text("a lake", encoding="utf-8")
    columns = {"image": "bild", "question": "frage", "answer": "antwort"}
    sources = [{"path": table, "columns": columns}, {"path": captions, "question": "Describe it."}]
    dataset = load_dataset(sources, processor=processor)
    assert [part.name for part in dataset.parts] == ["fragen", "captions"]
    assert [part.dataset.media_root.name for part in dataset.parts] == ["tables", "captions"]
    said = [[turn.text for turn in dataset.sample(index).turns] for index in range(2)]
    assert said == [["<image>\nWhat is it?", "a tree"], ["<image>\nDescribe it.", "a lake"]]
    assert all("pixel_values" in dataset[index] for index in range(2))
    alone = load_dataset(table, columns=columns, processor=processor)
    assert alone.sample(0) == dataset.sample(0)
    other = load_dataset(captions, question="What is there?", processor=processor)
    assert other.fingerprint != dataset.parts[1].dataset.fingerprint
