import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from mmpeft.core.errors import DataError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data.batching import StreamBatchSampler
from mmpeft.data.dataset import load_dataset
from mmpeft.data.stream_mixture import StreamedMixture
from tests.data.files import gpt, human, row, write_json, write_lines


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def rows(name, count):
    return [row(human(f"{name} {number}?"), gpt("a"), id=f"{name}{number}") for number in range(count)]


@pytest.fixture
def sources(tmp_path):
    return [
        {"path": write_lines(tmp_path / "a.jsonl", rows("a", 8)), "weight": 0.5},
        {"path": write_json(tmp_path / "b.json", rows("b", 3)), "weight": 2},
    ]


def stream(sources, processor, **options):
    return load_dataset(sources, processor=processor, streaming=True, **options)


def ids(mixture, epoch):
    return [mixture.parts[place.source].dataset.row(place).sample.id for place in mixture.places(epoch)]


def test_an_epoch_shows_each_source_by_its_weight_and_nothing_again_before_all(sources, processor, cache):
    mixture = stream(sources, processor, shuffle_buffer=4, seed=1)
    assert isinstance(mixture, StreamedMixture)
    assert [(part.name, part.samples, part.count) for part in mixture.parts] == [("a", 8, 4), ("b", 3, 6)]
    assert mixture.samples == 10
    epochs = [ids(mixture, epoch) for epoch in range(4)]
    assert {len(epoch) for epoch in epochs} == {10}
    for first, second in (epochs[:2], epochs[2:]):
        assert sorted(name for name in first + second if name[0] == "a") == [f"a{number}" for number in range(8)]
    for epoch in epochs:
        assert sorted(name for name in epoch if name[0] == "b") == sorted(2 * ["b0", "b1", "b2"])
    assert [ids(mixture, epoch) for epoch in range(4)] == epochs
    assert [ids(stream(sources, processor, shuffle_buffer=4, seed=2), epoch) for epoch in range(4)] != epochs
    assert not cache.exists()


def test_sources_come_to_their_ends_together(tmp_path, processor):
    paths = [write_lines(tmp_path / f"{name}.jsonl", rows(name, count)) for name, count in (("a", 6), ("b", 3))]
    mixture = stream(paths, processor, shuffle_buffer=1)
    assert ids(mixture, 0) == ["a0", "a1", "b0", "a2", "a3", "b1", "a4", "a5", "b2"]


def test_steps_are_the_same_on_any_number_of_processes(sources, processor):
    mixture = stream(sources, processor, shuffle_buffer=4)
    steps = []
    for world in (1, 2):
        samplers = [
            StreamBatchSampler(mixture, steps=6, micro=4 // world, accumulation=1, world=world, rank=rank)
            for rank in range(world)
        ]
        ranks = [[[place for place in batch if not place.blank] for batch in sampler] for sampler in samplers]
        steps.append([sorted(str(place) for batch in step for place in batch) for step in zip(*ranks, strict=True)])
    assert steps[0] == steps[1]
    assert [len(step) for step in steps[0]] == [4, 4, 2, 4, 4, 2]


def test_samples_are_encoded_in_workers_too(sources, processor):
    mixture = stream(sources, processor)
    want = {tuple(sample["input_ids"].tolist()) for sample in mixture}
    got = list(DataLoader(mixture, batch_size=None, num_workers=2))
    assert len(got) == 10
    assert {tuple(sample["input_ids"].tolist()) for sample in got} == want
    mixture.set_epoch(1)
    assert {tuple(sample["input_ids"].tolist()) for sample in mixture} != want


def test_errors_name_the_source(tmp_path, sources, processor):
    bad = write_lines(tmp_path / "bad.jsonl", [*rows("x", 110), {"id": "late"}])
    mixture = stream([*sources, bad], processor, shuffle_buffer=1)
    places = [place for place in mixture.places(0) if place.source == 2]
    with pytest.raises(DataError, match=r"^source 'bad': .*bad\.jsonl:111: sample 110 \(id 'late'\)"):
        mixture.take([places[0], places[-1]])
    with pytest.raises(DataError, match=r"^source 'gone': .*no such file"):
        stream([*sources, tmp_path / "gone.jsonl"], processor)


def test_what_is_left_out_is_named_with_its_file(tmp_path, sources, processor):
    bad = write_lines(tmp_path / "bad.jsonl", [*rows("x", 2), {"id": "bad"}])
    mixture = stream([*sources, bad], processor, shuffle_buffer=1, on_error="skip", max_skipped=0.25)
    places = list(mixture.places(0))
    wrong = next(place for place in places if place.source == 2 and place.row.number == 2)
    taken = mixture.take([places[0], wrong])
    assert len(taken) == 1
    assert [(sample.file, sample.line) for sample in taken.skipped] == [(str(bad), 3)]
    alone = mixture.take([wrong])
    assert set(alone[0]["labels"].tolist()) == {IGNORE_INDEX}
    assert mixture.allowed(13) == 3
    assert torch.equal(taken[0]["input_ids"], mixture.take(places[:1])[0]["input_ids"])
