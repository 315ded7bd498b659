"""Texts tokenised once: what comes from the cache is what would be made anew, for every family and to the bit."""

import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from mmpeft import load_dataset
from mmpeft.core.errors import DataError
from mmpeft.data.encode import encode_sample
from mmpeft.data.token_cache import TokenCache
from mmpeft.data.types import Media
from mmpeft.families.registry import family_of
from tests.families.models import MODELS, SINGLE_TURN
from tests.families.samples import SIZES, every_medium, first_medium, picture, sample_of
from tests.project import write_data
from tests.tiny import tiny_processor


def equal(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[key], right[key]) and left[key].dtype == right[key].dtype for key in left
    )


@pytest.mark.parametrize("family", MODELS)
def test_a_sample_from_the_cache_is_the_same(family):
    model, processor = MODELS[family]()
    made = [*every_medium(model, processor), first_medium(model), first_medium(model, 1)]
    if "image" in family_of(model).modalities:
        first, second = picture(SIZES[0], 0), picture(SIZES[1], 1)
        # The same words on another picture, and others on the same.
        made += [
            (sample_of("<image>\nWhat is it?", "a cat", images=1), Media(images=[first])),
            (sample_of("<image>\nWhat is it?", "a cat", images=1), Media(images=[second])),
            (sample_of("<image>\nWhat is it?", "a dog", images=1), Media(images=[first])),
        ]
        if family not in SINGLE_TURN:
            both = Media(images=[first, second])
            made.append((sample_of("<image>\nWho?", "a", "And <image>?", "b", images=2), both))
    if family not in SINGLE_TURN:
        made.append((sample_of("1 + 1?", "2", "2 + 2?", "4"), Media()))
    cache = TokenCache()
    for _ in range(2):
        for sample, media in made:
            whole = encode_sample(processor, sample, media)
            assert equal(encode_sample(processor, sample, media, cache=cache), whole)
            # The same entry serves every cut; this one goes into the last answer.
            cut = len(whole["input_ids"]) - 1
            plain = encode_sample(processor, sample, media, cut)
            assert equal(encode_sample(processor, sample, media, cut, cache=cache), plain)
    found, new = cache.counts()
    assert found + new == 4 * len(made)
    assert new <= len(made)


def test_a_chat_template_that_is_changed_is_asked_again():
    processor = tiny_processor()
    sample, cache = sample_of("Hi?", "Hello"), TokenCache()
    before = encode_sample(processor, sample, Media(), cache=cache)
    processor.chat_template = processor.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    after = encode_sample(processor, sample, Media(), cache=cache)
    assert len(after["input_ids"]) < len(before["input_ids"])
    assert equal(after, encode_sample(processor, sample, Media()))


def test_errors_are_those_without_it_each_time(processor):
    cache = TokenCache()
    for _ in range(2):
        with pytest.raises(DataError, match="control token"):
            encode_sample(processor, sample_of("<|im_end|>", "b"), Media(), cache=cache)
    sample = sample_of("What do you see in front of you?", "a")
    encode_sample(processor, sample, Media(), cache=cache)
    with pytest.raises(DataError, match="after the cut to max_length 8"):
        encode_sample(processor, sample, Media(), 8, cache=cache)


def test_it_stops_at_its_limit_and_what_it_holds_goes_on_being_used(processor):
    samples = [sample_of(f"{number}?", "yes") for number in range(20)]
    cache = TokenCache(limit_bytes=3_000)
    for _ in range(2):
        for sample in samples:
            assert equal(
                encode_sample(processor, sample, Media(), cache=cache), encode_sample(processor, sample, Media())
            )
            assert cache.held_bytes <= 3_000
    found, new = cache.counts()
    assert 0 < found < 20 < new
    assert found + new == 40
    assert cache.full


@pytest.fixture
def path(tmp_path):
    data = write_data(tmp_path / "data")
    return data / "train.json"


def test_workers_count_together_and_a_spawned_one_gets_no_texts(path, processor):
    dataset = load_dataset(path, media_root=path.parent / "images", processor=processor)
    expected = [dataset[index] for index in range(len(dataset))]
    cache = dataset.keep_tokens()
    empty = len(pickle.dumps(cache))
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        assert all(equal(*pair) for pair in zip(loader, expected, strict=True))
        assert sum(cache.counts()) == (epoch + 1) * len(dataset)
    # Texts of two rows may be the same.
    assert cache.counts()[0] >= len(dataset)
    assert cache.held_bytes > 0
    assert not cache.full
    assert len(pickle.dumps(cache)) < empty + 100
    assert pickle.loads(pickle.dumps(cache)).held_bytes == 0
    assert dataset.keep_tokens() is cache
    assert cache.counts() == (0, 0)
    # What workers tokenised the training process knows, and so do the workers of the next stage.
    for again in (DataLoader(dataset, batch_size=None), DataLoader(dataset, batch_size=None, num_workers=2)):
        assert all(equal(*pair) for pair in zip(again, expected, strict=True))
    assert cache.counts() == (2 * len(dataset), 0)


def test_each_worker_takes_what_another_tokenised(path, processor):
    dataset = load_dataset(path, media_root=path.parent / "images", processor=processor)
    cache = dataset.keep_tokens()
    count, texts = len(dataset), len({repr(dataset.sample(index).turns) for index in range(len(dataset))})
    # In the second epoch every sample comes to the other worker.
    for order in (list(range(count)), [1, 0, *range(3, count), 2]):
        loader = DataLoader(dataset, batch_sampler=[[index] for index in order], num_workers=2, collate_fn=len)
        assert len(list(loader)) == count
        if order[0] == 0:
            assert cache.counts()[1] <= texts + count // 2
            first = cache.counts()[1]
    assert cache.counts() == (2 * count - first, first)


def test_other_wordings_are_kept_apart(path, processor):
    rows = json.loads(path.read_text())
    asked = rows[0]["conversations"][0]["value"].replace("<image>", "").strip()
    dataset = load_dataset(path, media_root=path.parent / "images", processor=processor)
    dataset.augment_with({"paraphrase": {asked: ["What can be seen?", "Say what it shows."]}}, seed=1)
    plain = [dataset.encoded(0, epoch=epoch) for epoch in range(8)]
    assert len({tuple(sample["input_ids"].tolist()) for sample in plain}) > 1
    cache = dataset.keep_tokens()
    assert all(equal(dataset.encoded(0, epoch=epoch), plain[epoch]) for epoch in range(8))
    assert cache.counts()[0] >= 5
