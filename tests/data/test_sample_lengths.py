"""Lengths by headers alone: those of the encoded samples, measured once, and again when anything changed."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data.collate import MultimodalCollator
from mmpeft.data.cutting import Bounds, CostModel, count_micro_batches, cut, items_of
from mmpeft.data.dataset import load_dataset
from mmpeft.data.load_media import MediaLimits
from mmpeft.data.packing import PackedCollator, plan_packing
from mmpeft.families.registry import family_of
from tests.data.films import film
from tests.families.models import FIRST_CLASS, SINGLE_TURN


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "mmpeft").glob("lengths-*"))


def write(folder, *, pictures=True, several=True):
    """Samples with none, one and two pictures of unlike sizes, two of them on one picture."""
    for name, size in (("a", (40, 24)), ("b", (64, 96)), ("c", (200, 30))):
        Image.new("RGB", size, "red").save(folder / f"{name}.png")
    rows = [("", [], "yes " * 9)]
    if pictures:
        rows += [("<image>\n", ["a.png"], "no"), ("<image>\n", ["a.png"], "yes, yes"), ("<image>\n", ["c.png"], "ß 图")]
    if pictures and several:
        rows.append(("<image>\n<image>\n", ["b.png", "c.png"], "two"))
    lines = [
        {
            "image": images,
            "conversations": [{"from": "human", "value": f"{before}what?"}, {"from": "gpt", "value": text}],
        }
        for before, images, text in rows
    ]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_lengths_are_those_of_the_encoded_samples_without_a_picture_decoded(tmp_path, family, monkeypatch):
    model, processor = FIRST_CLASS[family]()
    sees = "image" in family_of(model).modalities
    path = write(tmp_path, pictures=sees, several=family not in SINGLE_TURN)
    dataset = load_dataset(path, processor=processor)
    encoded = [dataset[index]["input_ids"] for index in range(len(dataset))]
    with monkeypatch.context() as patch:
        patch.setattr("mmpeft.data.load_media.load_image", pytest.fail)
        lengths = dataset.lengths()
    assert lengths["tokens"].tolist() == [len(ids) for ids in encoded]
    assert lengths["media"][0] == 0
    assert lengths["picture"][0] == 0
    if sees:
        assert lengths["picture"][1] == lengths["picture"][2] != lengths["picture"][3]
        assert 0 < lengths["media"][1] < lengths["tokens"][1]


def test_the_shared_beginning_is_what_a_row_shares_at_least(tmp_path, processor):
    dataset = load_dataset(write(tmp_path), processor=processor)
    lengths = dataset.lengths()
    assert lengths["beginning"][1] == lengths["beginning"][2] != 0
    tree = plan_packing([dataset[1], dataset[2]], frozenset({processor.image_token_id})).tree
    row = tree.segments[-1].end
    assert row <= int(lengths["tokens"][1:3].sum() - lengths["shared"][2])
    assert row < int(lengths["tokens"][1:3].sum())


def test_a_second_run_tokenises_nothing_and_a_changed_input_is_measured_again(tmp_path, processor, monkeypatch):
    path = write(tmp_path)
    first = load_dataset(path, processor=processor).lengths()
    assert len(entries(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr("mmpeft.data.sample_lengths.label_turns", pytest.fail)
        second = load_dataset(path, processor=processor).lengths()
    assert isinstance(second, np.memmap)
    assert np.array_equal(first, second)
    short = load_dataset(path, processor=processor, max_length=60).lengths()
    assert short["tokens"].max() == 60
    path.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:2]), encoding="utf-8")
    assert len(load_dataset(path, processor=processor).lengths()) == 2
    assert len(entries(tmp_path)) == 3


def test_a_picture_of_another_size_is_measured_again_where_sizes_matter(tmp_path):
    _, processor = FIRST_CLASS["qwen2_vl"]()
    path = write(tmp_path)
    before = load_dataset(path, processor=processor).lengths()["tokens"].tolist()
    Image.new("RGB", (160, 160)).save(tmp_path / "a.png")
    dataset = load_dataset(path, processor=processor)
    after = dataset.lengths()["tokens"].tolist()
    assert after[1] != before[1]
    assert after == [len(dataset[index]["input_ids"]) for index in range(len(dataset))]


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: b"", lambda data: data[:200] + bytes(400)])
def test_a_damaged_entry_is_measured_again(tmp_path, processor, damage):
    path = write(tmp_path)
    want = load_dataset(path, processor=processor).lengths().tolist()
    (entry,) = entries(tmp_path)
    entry.write_bytes(damage(entry.read_bytes()))
    assert load_dataset(path, processor=processor).lengths().tolist() == want


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, processor, caplog, monkeypatch):
    dataset = load_dataset(write(tmp_path), processor=processor)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "train.jsonl")
    assert len(dataset.lengths()) == 5
    assert "not kept for the next run" in caplog.text


def test_films_are_measured_by_their_headers(tmp_path):
    _, processor = FIRST_CLASS["qwen2_5_vl"]()
    for number in range(3):
        film(tmp_path / f"{number}.mp4", frames=20 + 15 * number)
    rows = [
        {
            "video": f"{number}.mp4",
            "conversations": [{"from": "human", "value": "<video>\nwhat?"}, {"from": "gpt", "value": "a film"}],
        }
        for number in range(3)
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    dataset = load_dataset(path, processor=processor, limits=MediaLimits(max_frames=4))
    assert dataset.lengths()["tokens"].tolist() == [len(dataset[number]["input_ids"]) for number in range(3)]


def test_a_mixture_has_the_lengths_of_the_samples_that_an_epoch_shows(tmp_path, processor):
    write(tmp_path)
    (tmp_path / "b").mkdir()
    sources = [
        {"path": tmp_path / "train.jsonl", "weight": 1.6, "name": "a"},
        {"path": write(tmp_path / "b"), "name": "b", "weight": 0.6},
    ]
    mixture = load_dataset(sources, processor=processor, seed=3)
    for epoch in (0, 1, 2):
        lengths = mixture.lengths(epoch)
        mixture.set_epoch(epoch)
        assert lengths["tokens"].tolist() == [len(mixture[index]["input_ids"]) for index in range(len(mixture))]


def test_a_medium_that_went_is_named(tmp_path):
    _, processor = FIRST_CLASS["qwen2_vl"]()
    dataset = load_dataset(write(tmp_path), processor=processor)
    (tmp_path / "c.png").unlink()
    with pytest.raises(DataError, match=r"'c\.png' does not exist"):
        dataset.lengths()


def test_rows_that_are_left_out_have_no_length(tmp_path, processor):
    path = write(tmp_path)
    (tmp_path / "b.png").write_bytes(b"no picture")
    dataset = load_dataset(path, processor=processor, on_error="skip", max_skipped=1)
    assert [skipped.index for skipped in dataset.skipped] == [4]
    assert dataset.lengths()["tokens"].tolist() == [len(dataset[index]["input_ids"]) for index in range(4)]


def test_samples_that_are_varied_share_nothing(tmp_path, processor):
    dataset = load_dataset(write(tmp_path), processor=processor)
    assert dataset.lengths()["shared"].max() > 0
    dataset.augment_with({"colour": {"brightness": 0.2}})
    assert dataset.lengths()["shared"].max() == 0


@pytest.mark.parametrize("family", FIRST_CLASS)
def test_micro_batches_within_a_budget_are_so_once_they_are_collated(tmp_path, family):
    model, processor = FIRST_CLASS[family]()
    spec = family_of(model)
    path = write(tmp_path, pictures="image" in spec.modalities, several=family not in SINGLE_TURN)
    dataset = load_dataset(path, processor=processor)
    lengths = dataset.lengths()
    budget = int(lengths["tokens"].max())
    for packed in (False, True) if spec.packable else (False,):
        bounds = Bounds(tokens=budget, packed=packed, share=packed)
        items = items_of(lengths)
        collator = PackedCollator(processor) if packed else MultimodalCollator(processor)
        batches = cut(items, count_micro_batches(items, bounds, CostModel()), bounds, CostModel())
        assert sorted(place for batch in batches for place in batch) == list(range(len(dataset)))
        for batch in batches:
            assert collator([dataset[place] for place in batch])["input_ids"].numel() <= budget
