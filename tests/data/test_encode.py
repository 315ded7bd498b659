import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmpeft.core.errors import DataError, ModelError
from mmpeft.core.types import IGNORE_INDEX
from mmpeft.data import expand
from mmpeft.data.chat import render_chat
from mmpeft.data.encode import cut_before_media, encode_sample
from mmpeft.data.expand import picture_length
from mmpeft.data.labels import LabelledTokens
from mmpeft.data.types import Media, Sample, Turn
from tests.data.files import COLOURS
from tests.data.test_chat import conversation
from tests.tiny import IMAGE_TOKENS, tiny_llava, tiny_processor

PROCESSOR = tiny_processor()
PICTURE = 9


def sample_of(turns, pictures):
    return Sample(id="x", turns=tuple(turns), images=("a.png",) * pictures, index=0, line=1)


def pictures_of(count):
    return [Image.new("RGB", (20, 30), COLOURS[number]) for number in range(count)]


def media_of(count):
    return Media(images=pictures_of(count))


@pytest.mark.parametrize("text", ["q", "<image>\nq", "<image><image>q", "a <image> b <image>\n<image>c"])
def test_ids_and_pixels_are_those_of_the_processor_itself(text):
    count = text.count("<image>")
    turns = conversation(text, "红色 red", "and?", "two")
    found = encode_sample(PROCESSOR, sample_of(turns, count), media_of(count))
    whole = PROCESSOR(
        text=render_chat(PROCESSOR, turns, add_generation_prompt=False),
        images=pictures_of(count) or None,
        return_tensors="pt",
    )
    assert torch.equal(found["input_ids"], whole["input_ids"][0])
    assert ("pixel_values" in found) == bool(count)
    if count:
        assert torch.equal(found["pixel_values"], whole["pixel_values"])
        assert found["pixel_values"].shape == (count, 3, 16, 16)
    assert found["labels"].dtype == found["input_ids"].dtype == torch.long
    labelled = found["labels"][found["labels"] != IGNORE_INDEX]
    assert PROCESSOR.tokenizer.decode(labelled) == "红色 red<|im_end|>two<|im_end|>"


def test_only_keys_of_the_models_forward_come_out():
    found = encode_sample(PROCESSOR, sample_of(conversation("<image>q", "a"), 1), media_of(1))
    assert set(found) <= set(inspect.signature(tiny_llava().forward).parameters)


@st.composite
def cut_case(draw):
    kinds = draw(st.lists(st.sampled_from("tap"), min_size=1, max_size=12))
    lengths = [draw(st.integers(1, 5)) for kind in kinds if kind == "p"]
    return kinds, lengths, draw(st.integers(1, 40))


@given(cut_case())
def test_a_cut_keeps_a_longest_prefix_that_splits_no_picture(case):
    kinds, lengths, limit = case
    remaining = iter(lengths)
    pieces = [next(remaining) if kind == "p" else 1 for kind in kinds]
    starts = [sum(pieces[:number]) for number in range(len(pieces))]
    labels = [1 if kind == "a" else IGNORE_INDEX for kind, size in zip(kinds, pieces, strict=True) for _ in range(size)]
    media = [(start, start + size) for start, size, kind in zip(starts, pieces, kinds, strict=True) if kind == "p"]
    tokens = LabelledTokens(input_ids=[PICTURE] * len(labels), labels=labels, media=tuple(media))
    kept = 0
    while kept < len(pieces) and sum(pieces[: kept + 1]) <= limit:
        kept += 1
    if "a" not in kinds[:kept]:
        with pytest.raises(DataError, match=f"after the cut to max_length {limit}; raise max_length"):
            cut_before_media(tokens, limit)
        return
    assert cut_before_media(tokens, limit) == sum(pieces[:kept])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 100))
def test_a_truncated_sample_still_goes_through_the_model(limit):
    turns = conversation("<image>q", "a", "<image>r", "b")
    before_the_answer = len(
        PROCESSOR.tokenizer("<|im_start|>user\n<image>q<|im_end|>\n<|im_start|>assistant\n").input_ids
    )
    if limit <= before_the_answer + IMAGE_TOKENS - 1:
        with pytest.raises(DataError, match="no answer token is left"):
            encode_sample(PROCESSOR, sample_of(turns, 2), media_of(2), max_length=limit)
        return
    found = encode_sample(PROCESSOR, sample_of(turns, 2), media_of(2), max_length=limit)
    assert len(found["input_ids"]) <= limit
    runs = (found["input_ids"] == PROCESSOR.image_token_id).sum().item()
    assert runs == IMAGE_TOKENS * len(found.get("pixel_values", ()))


def test_a_picture_behind_the_cut_goes_with_its_pixels():
    turns = conversation("q", "a", "<image>r", "b")
    whole = encode_sample(PROCESSOR, sample_of(turns, 1), media_of(1))
    first = (whole["input_ids"] == PROCESSOR.image_token_id).nonzero()[0].item()
    for inside in range(IMAGE_TOKENS):
        cut = encode_sample(PROCESSOR, sample_of(turns, 1), media_of(1), max_length=first + inside)
        assert len(cut["input_ids"]) == first
        assert "pixel_values" not in cut


def test_forged_pictures_are_refused():
    sample = sample_of([Turn(role="user", text="q"), Turn(role="assistant", text="<|pad|>")], 0)
    with pytest.raises(DataError, match=r"holds '<\|pad\|>'"):
        encode_sample(PROCESSOR, sample, Media())


def test_pictures_and_placeholders_must_agree():
    with pytest.raises(DataError, match="writes 1 image tokens for 2 in the sample"):
        encode_sample(PROCESSOR, sample_of(conversation("<image>q", "a"), 2), media_of(2))


def test_the_length_of_a_picture_is_known_without_its_pixels():
    assert picture_length(PROCESSOR, (20_000, 3_000)) == IMAGE_TOKENS


def test_the_length_of_a_picture_may_depend_on_its_size(monkeypatch):
    monkeypatch.setattr(expand, "_length", lambda processor, modality, media: 1 + (media.images[0].width > 100))
    assert [picture_length(tiny_processor(), size) for size in ((50, 50), (200, 50))] == [1, 2]


def test_a_processor_that_does_not_say_what_it_writes_is_named(monkeypatch):
    processor = tiny_processor()
    whole = type(processor).__call__

    def silent(self, *arguments, **options):
        found = whole(self, *arguments, **options)
        found.pop("text_replacement_offsets", None)
        return found

    monkeypatch.setattr(type(processor), "__call__", silent)
    with pytest.raises(ModelError, match="does not say what it writes in the place of a medium"):
        encode_sample(processor, sample_of(conversation("<image><image>q", "a"), 2), media_of(2))


def test_what_a_processor_refuses_is_said(monkeypatch):
    processor = tiny_processor()

    def refuse(self, *arguments, **options):
        raise ValueError("absolute aspect ratio must be smaller than 200")

    monkeypatch.setattr(type(processor), "__call__", refuse)
    with pytest.raises(DataError, match="LlavaProcessor refuses its media: absolute aspect ratio"):
        encode_sample(processor, sample_of(conversation("<image>q", "a"), 1), media_of(1))
