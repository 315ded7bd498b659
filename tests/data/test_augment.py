import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmpeft.config.augment import AugmentConfig, CropConfig
from mmpeft.core.errors import RecipeError
from mmpeft.data.altered import crop_window
from mmpeft.data.augment import Augmentation, augment, augmentation_of
from mmpeft.data.types import Box, Media, Sample, Turn, Video

ALL = {"crop": True, "colour": {"hue": 0.1}, "flip": True, "paraphrase": {"What is it?": ["What do you see?", "Say!"]}}


def sample_of(question="What is it?", answer="a cat", **fields):
    turns = (Turn(role="user", text=f"<image>\n{question}"), Turn(role="assistant", text=answer))
    return Sample(**{"id": "s", "turns": turns, "images": ("a.png",), "index": 0, "line": 1, **fields})


def picture(size=(40, 30), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def pixels(media):
    return [np.asarray(image) for image in media.images]


def flipped(sample, media=None, **flip):
    """Whether the sample's picture was mirrored, and what became of the sample."""
    media = media or Media(images=(picture(),))
    settings = augmentation_of({"flip": {"probability": 1, **flip}})
    after, moved = augment(sample, media, settings, seed=0, epoch=0)
    if np.array_equal(pixels(moved)[0], pixels(media)[0]):
        assert after == sample
        return False, after
    assert np.array_equal(pixels(moved)[0], pixels(media)[0][:, ::-1])
    return True, after


def test_nothing_asked_for_is_nothing_done():
    sample, media = sample_of(), Media(images=(picture(),))
    assert augmentation_of(None) is None
    assert augment(sample, media, augmentation_of({}), seed=0, epoch=3) == (sample, media)


def test_epochs_and_samples_differ_and_the_same_is_the_same():
    settings, media = augmentation_of(ALL), Media(images=(picture(),))
    seen = {}
    for seed in (0, 1):
        for index in (0, 1):
            for epoch in (0, 1, 2):
                sample = sample_of(index=index, id=str(index))
                (_, one), (_, two) = (augment(sample, media, settings, seed=seed, epoch=epoch) for _ in "ab")
                assert np.array_equal(pixels(one)[0], pixels(two)[0])
                seen[pixels(one)[0].tobytes()] = True
    assert len(seen) == 12


def test_another_process_draws_the_same():
    code = (
        "from mmpeft.core.hashing import hash_value; from tests.data.test_augment import *\n"
        "s, m = augment(sample_of(), Media(images=(picture(),)), augmentation_of(ALL), seed=5, epoch=7)\n"
        "print(s.turns[0].text, m.images[0].size, hash_value(m.images[0].tobytes().hex()))"
    )
    said = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    assert said[0] == said[1]
    assert said[0]


def test_one_operation_leaves_the_draws_of_another_alone():
    media = Media(images=(picture(),))
    _, alone = augment(sample_of(), media, augmentation_of({"crop": True}), seed=0, epoch=0)
    _, both = augment(sample_of(), media, augmentation_of({"crop": True, "colour": True}), seed=0, epoch=0)
    assert alone.images[0].size == both.images[0].size


def test_every_alternative_comes_up_and_only_the_user_s_text_changes():
    settings = augmentation_of({"paraphrase": ALL["paraphrase"]})
    sample = sample_of(answer="What is it?")
    seen = {augment(sample, Media(), settings, seed=0, epoch=epoch)[0].turns[0].text for epoch in range(40)}
    assert seen == {"<image>\nWhat is it?", "<image>\nWhat do you see?", "<image>\nSay!"}
    after, _ = augment(sample, Media(), settings, seed=0, epoch=1)
    assert after.turns[1] == sample.turns[1]


def test_a_flip_leaves_samples_that_name_a_side():
    assert flipped(sample_of())[0]
    assert not flipped(sample_of("What is left of it?"))[0]
    assert not flipped(sample_of(answer="the one on the Right"))[0]
    assert flipped(sample_of("Was ist links?"))[0]
    for words in ({"links": "rechts"}, ["links"]):
        assert not flipped(sample_of("Was ist links?"), words=words)[0]


def test_a_flip_swaps_left_and_right_where_it_is_told_to():
    done, after = flipped(sample_of("What is left of it?", "On the right."), sided="swap")
    assert done
    assert [turn.text for turn in after.turns] == ["<image>\nWhat is right of it?", "On the left."]
    assert not flipped(sample_of("Was ist ostwärts?"), sided="swap", words={"ostwärts": None})[0]
    assert augmentation_of({"flip": "swap"}).flip.sided == "swap"


def test_a_flip_leaves_the_kinds_that_the_user_lists_and_places_written_as_numbers():
    assert not flipped(sample_of(kind="ocr"), except_kinds=["ocr"])[0]
    assert flipped(sample_of(kind="vqa"), except_kinds=["ocr"])[0]
    places = (
        "At [0.1, 0.2, 0.5, 0.6].",
        "<loc0010><loc0020><loc0100><loc0200>",
        "<box>(3,4),(5,6)</box>",
        "<loc_52><loc_333><loc_932><loc_774>",
        '<point x="61.5" y="40.4" alt="cat">cat</point>',
        '{"x": 61, "y": 40}',
        "<patch_index_0044><patch_index_0863>",
    )
    for text in places:
        assert not flipped(sample_of(answer=text))[0], text
    for text in ("In 1999 [sic], 3 x 4 = 12", "x is 3", "2 (two) of 3"):
        assert flipped(sample_of(answer=text))[0], text


def test_a_crop_leaves_places_written_as_numbers():
    media = Media(images=(picture(),))
    settings = augmentation_of({"crop": {"area": [0.3, 0.3]}})
    assert augment(sample_of(answer="[1, 2, 3, 4]"), media, settings, seed=0, epoch=0)[1] == media
    assert augment(sample_of(), media, settings, seed=0, epoch=0)[1].images[0].size != (40, 30)


def test_all_pictures_of_a_sample_are_mirrored_together_and_boxes_with_them():
    box, point = Box(values=(4, 5, 10, 20)), Box(values=(0.25, 0.5), picture=1, unit="fraction")
    sample = sample_of("Where is <box>, where <box>?", images=("a", "b"), boxes=(box, point))
    media = Media(images=(picture(), picture((20, 10))))
    settings = augmentation_of({"flip": {"probability": 1}})
    after, moved = augment(sample, media, settings, seed=0, epoch=0)
    assert after.boxes == (Box(values=(30, 5, 36, 20)), Box(values=(15, 5), picture=1))
    for one, two in zip(pixels(media), pixels(moved), strict=True):
        assert np.array_equal(one[:, ::-1], two)


def test_a_film_s_frames_change_alike():
    frame = np.asarray(picture())
    film = Video(frames=np.stack([frame] * 3), indices=(0, 1, 2), fps=2.0, total_frames=3)
    settings = augmentation_of({"crop": {"area": [0.5, 0.5]}, "flip": {"probability": 1}, "colour": {"hue": 0.2}})
    sample = sample_of(images=(), videos=("a.mp4",))
    _, moved = augment(sample, Media(videos=(film,)), settings, seed=0, epoch=0)
    frames = moved.videos[0].frames
    assert frames.shape[0] == 3
    assert frames.shape[1] * frames.shape[2] == pytest.approx(600, rel=0.1)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames[0], frames[2])
    assert moved.videos[0].indices == film.indices


def test_colours_change_within_their_bounds():
    grey = Media(images=(Image.new("RGB", (8, 8), (100, 100, 100)),))
    settings = augmentation_of({"colour": {"brightness": 0.2, "contrast": 0, "saturation": 0}})
    seen = [pixels(augment(sample_of(), grey, settings, seed=0, epoch=epoch)[1])[0] for epoch in range(60)]
    means = [values.mean() for values in seen]
    assert 79 <= min(means) < 85
    assert 115 < max(means) <= 121
    red = Media(images=(Image.new("RGB", (8, 8), "red"),))
    plain = {"brightness": 0, "contrast": 0, "saturation": 0}
    assert np.array_equal(
        pixels(augment(sample_of(), red, augmentation_of({"colour": plain}), seed=0, epoch=0)[1])[0], pixels(red)[0]
    )
    turned = augment(sample_of(), red, augmentation_of({"colour": {**plain, "hue": 0.5}}), seed=0, epoch=0)[1]
    assert pixels(turned)[0].max() == 255
    assert not np.array_equal(pixels(turned)[0], pixels(red)[0])


def test_a_probability_is_kept():
    settings, media = augmentation_of({"flip": {"probability": 0.25}}), Media(images=(picture(),))
    count = sum(augment(sample_of(index=index), media, settings, seed=0, epoch=0)[1] != media for index in range(400))
    assert 70 < count < 130


SIDES = st.integers(1, 400)


@given(width=SIDES, height=SIDES, low=st.floats(0.05, 1), seed=st.integers(0, 2**32), data=st.data())
def test_a_crop_lies_inside_keeps_its_bounds_and_holds_all_boxes(width, height, low, seed, data):
    crop = CropConfig(area=(low, 1.0), aspect=(0.5, 2.0))
    keep = []
    for _ in range(data.draw(st.integers(0, 3))):
        x1, x2 = sorted(data.draw(st.tuples(st.floats(0, width), st.floats(0, width))))
        y1, y2 = sorted(data.draw(st.tuples(st.floats(0, height), st.floats(0, height))))
        keep.append((x1, y1, x2, y2) if data.draw(st.booleans()) else (x1, y1))
    left, top, right, bottom = crop_window((width, height), crop, np.random.default_rng(seed), keep=keep)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    for values in keep:
        assert left <= min(values[::2]) <= max(values[::2]) <= right
        assert top <= min(values[1::2]) <= max(values[1::2]) <= bottom
    if not keep:
        wide, high = right - left, bottom - top
        assert (wide + 0.5) * (high + 0.5) >= low * width * height * 0.999
        factor = (wide / width) / (high / height)
        slack = (1 + 0.5 / wide) * (1 + 0.5 / high) * 1.01
        assert 0.5 / slack / slack <= factor <= 2 * slack * slack


@given(
    size=st.tuples(st.integers(2, 200), st.integers(2, 200)),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    epoch=st.integers(0, 50),
)
def test_a_box_marks_the_same_pixels_before_and_after(size, shares, epoch):
    """A box drawn white on black covers the white pixels of the picture that crop and flip make of it."""
    width, height = size
    (x1, x2), (y1, y2) = (
        sorted(round(share * whole) for share in pair) for pair, whole in ((shares[:2], width), (shares[2:], height))
    )
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    canvas[y1:y2, x1:x2] = 255
    sample = sample_of("Where? <box>", boxes=(Box(values=(x1, y1, x2, y2)),))
    settings = augmentation_of({"crop": {"area": [0.2, 1.0], "aspect": [0.5, 2]}, "flip": True})
    after, moved = augment(sample, Media(images=(Image.fromarray(canvas),)), settings, seed=0, epoch=epoch)
    left, top, right, bottom = after.boxes[0].values
    want = np.zeros((*moved.images[0].size[::-1], 3), dtype=np.uint8)
    want[int(top) : int(bottom), int(left) : int(right)] = 255
    assert all(float(value).is_integer() for value in after.boxes[0].values)
    assert np.array_equal(pixels(moved)[0], want)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"crop": {"area": [0.9, 0.5]}}, "crop.area: found [0.9, 0.5]; expected two shares of the area"),
        ({"crop": {"aspect": [1.2, 1.5]}}, "crop.aspect: found [1.2, 1.5]; expected two factors"),
        ({"crop": {"aspect": [0.5, math.nan]}}, "crop.aspect: found [0.5, nan]"),
        ({"crop": {"aspects": [1, 1]}}, "crop.aspects: unknown key; did you mean 'aspect'?"),
        ({"colour": {"hue": 0.7}}, "colour.hue: found 0.7; input should be less than or equal to 0.5"),
        ({"colour": {"brightness": True}}, "colour.brightness: expected a number"),
        ({"flip": "swop"}, "flip.sided: found 'swop'; expected 'leave' or 'swap'; did you mean 'swap'?"),
        ({"flip": {"words": {"links": ""}}}, "flip.words: found 'links': ''"),
        ({"paraphrase": {"a": "b"}}, "paraphrase: found 'a': 'b'; expected a text and a list"),
        ({"color": True}, "color: unknown key; did you mean 'colour'?"),
    ],
)
def test_a_bad_setting_names_its_key(value, words):
    with pytest.raises(RecipeError) as caught:
        augmentation_of(value)
    assert words in str(caught.value)
    assert "augment: 1 problem" in str(caught.value)


@pytest.mark.parametrize("table", [{"a": ["b"]}, [["a", "b", "c"], ["d", "e"]]])
def test_a_block_that_was_written_is_read_back_as_it_was(table):
    block = AugmentConfig.model_validate({**ALL, "paraphrase": table})
    again = AugmentConfig.model_validate(block.model_dump(mode="json"))
    assert again == block
    assert augmentation_of(again) == augmentation_of(block)


def test_settings_are_frozen_and_become_plain_values():
    settings = augmentation_of(ALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.crop = None
    assert settings.to_dict()["flip"]["probability"] == 0.5
    assert Augmentation().to_dict() == {"paraphrases": {}}
