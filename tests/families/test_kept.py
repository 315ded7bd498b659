"""Samples from what is kept of their media: what decoding them gives, without a picture being opened."""

import json
import os

import numpy as np
import pytest
import soundfile
import torch

from mmpeft.data.dataset import load_dataset
from mmpeft.data.feature_store import Entry, FeatureStore
from mmpeft.data.join_features import HEAVY
from mmpeft.families.registry import family_of
from tests.data.files import gpt, human, row, write_lines
from tests.data.films import film
from tests.families.models import ENCODED_TOGETHER, FIRST_CLASS, SINGLE_TURN
from tests.families.samples import SIZES, picture

LIMIT = 1 << 30


@pytest.fixture(scope="module", params=sorted(FIRST_CLASS))
def family(request):
    return request.param, *FIRST_CLASS[request.param]()


def write(folder, name, model):
    """A data file with every kind of media that the family takes."""
    rows = []
    taken = family_of(model).modalities
    if "image" in taken:
        for number, size in enumerate(SIZES[:2]):
            picture(size, number).save(folder / f"{number}.png")
        rows += [
            row(human("<image>\nWhat is it?"), gpt("a cat"), image="0.png"),
            row(human("<image>\nAnd this?"), gpt("a dog, or a cat"), image="1.png"),
            row(human("<image>\nWhere?"), gpt("there"), image="0.png"),
        ]
        if name not in SINGLE_TURN:
            rows.append(row(human("<image> <image>\nBoth?"), gpt("yes"), images=["0.png", "1.png"]))
    if "video" in taken:
        film(folder / "a.mp4", frames=50, size=(48, 32))
        rows.append(row(human("<video>\nWhat happens?"), gpt("nothing"), video="a.mp4"))
    if "audio" in taken:
        sound = np.random.default_rng(0).uniform(-1, 1, 8000).astype(np.float32)
        soundfile.write(folder / "a.wav", sound, 16_000)
        rows.append(row(human("<audio>\nWhat is said?"), gpt("hello"), audio="a.wav"))
    file = folder / "train.jsonl"
    file.write_text("\n".join(json.dumps(each) for each in rows), encoding="utf-8")
    return file


def damage(medium):
    """Rubbish of the same size and date, whose hash is that of before: whoever decodes it fails."""
    facts = medium.stat()
    medium.write_bytes(bytes(facts.st_size))
    os.utime(medium, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def keep_all(dataset, store):
    """Every sample's media kept, with features that are nothing but numbers."""
    for index in range(len(dataset)):
        sample = dataset[index]
        if "features_rest" in sample:
            features = {"image/x": torch.full((2, 3), float(index))}
            assert store.write(sample["features_key"], Entry(tensors=features, expansion=sample["features_rest"]))


def test_kept_samples_are_those_of_decoded_media(family, tmp_path):
    name, model, processor = family
    file = write(tmp_path, name, model)
    plain, kept = (load_dataset(file, processor=processor) for _ in range(2))
    store = FeatureStore(tmp_path / "cache", LIMIT)
    kept.keep_features(store, "weights")
    keep_all(kept, store)
    wanted = [plain[index] for index in range(len(plain))]
    for medium in (path for ending in ("png", "mp4", "wav") for path in tmp_path.glob(f"*.{ending}")):
        damage(medium)
    found = [kept[index] for index in range(len(kept))]
    assert any("features" in sample for sample in found)
    for sample, expected in zip(found, wanted, strict=True):
        light = {key: value for key, value in expected.items() if key not in HEAVY}
        assert {key for key in sample if not key.startswith("features")} == set(light)
        for key, value in light.items():
            assert torch.equal(sample[key], value), key
        shapes = {key: (tuple(value.shape), value.dtype) for key, value in expected.items() if key in HEAVY}
        assert sample["features_shapes"] == shapes


def test_a_picture_behind_the_cut_is_not_waited_for(family, tmp_path):
    name, model, processor = family
    if "image" not in family_of(model).modalities or name in SINGLE_TURN or name in ENCODED_TOGETHER:
        pytest.skip(f"{name} takes one turn, or no pictures, or cuts them together only")
    for number in range(2):
        picture((32, 32), number).save(tmp_path / f"{number}.png")
    turns = [human("<image>q"), gpt("yes"), human("<image>r"), gpt("no")]
    one = write_lines(tmp_path / "one.jsonl", [row(*turns[:2], image="0.png")])
    both = write_lines(tmp_path / "both.jsonl", [row(*turns, images=["0.png", "1.png"])])
    length = len(load_dataset(one, processor=processor)[0]["input_ids"]) + 2
    store = FeatureStore(tmp_path / "cache", LIMIT)
    cut = load_dataset(both, processor=processor, max_length=length)
    wanted = cut[0]
    cut.keep_features(store, "weights")
    keep_all(cut, store)
    # The key is that of the one picture that is left; of the whole sample's media the texts alone are kept.
    alone, longer = (load_dataset(file, processor=processor) for file in (one, both))
    expected = longer[0]
    for dataset in (alone, longer):
        dataset.keep_features(store, "weights")
    found = longer[0]
    assert "features" not in found, "texts do not stand in for features"
    assert {key for key in found if not key.startswith("features")} == set(expected)
    for number in range(2):
        damage(tmp_path / f"{number}.png")
    assert alone[0]["features_key"] == cut[0]["features_key"]
    assert "features" in alone[0]
    assert "features" in cut[0]
    assert torch.equal(cut[0]["input_ids"], wanted["input_ids"])
