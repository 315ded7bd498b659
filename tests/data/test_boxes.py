"""Boxes on their way from a data file through check, training and questions."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmpeft import load_dataset
from mmpeft.core.errors import DataError
from mmpeft.data.augment import augment, augmentation_of
from mmpeft.data.box_text import box_convention, read_boxes, resized_size, with_boxes
from mmpeft.data.boxes import relative_values
from mmpeft.data.check import check_data
from mmpeft.data.encode import encode_sample
from mmpeft.data.mend import mend_data
from mmpeft.data.types import Box, Media, Sample, Turn
from mmpeft.families.registry import family_of
from mmpeft.models.pixels import limit_pixels
from tests.data.files import gpt, human, picture, row, write_lines
from tests.families.models import FIRST_CLASS

STEP = {"fraction": 1 / 1000, "thousandths": 1 / 1000, "location_tokens": 1 / 1024}
"""What the rounding of a convention leaves of a place, at most; half of it in the middle, all of it at an edge."""

FAMILIES = [name for name in FIRST_CLASS if name != "qwen2_audio"]
LARGE = 60 * 8**2
"""Pixels that the tiny Qwen processors may keep here; they keep 8 tokens' worth otherwise, a box of 1 x 8 of them."""


@pytest.fixture(scope="module")
def families():
    """Model and processor of each family."""
    made = {name: FIRST_CLASS[name]() for name in FAMILIES}
    for name, (_, processor) in made.items():
        if box_convention(processor) == "resized_pixels":
            processor.image_processor.size = {"shortest_edge": 8**2, "longest_edge": LARGE}
            assert "qwen" in name
    return made


def sample_of(*boxes, answer="It is <box>."):
    turns = (Turn(role="user", text="<image>\nWhere?"), Turn(role="assistant", text=answer))
    return Sample(id="s", turns=turns, images=("a.png",), boxes=boxes, index=0, line=1)


def blank(size):
    return Image.new("RGB", size, "white")


def answered(processor, sample, media):
    """The answer as the model is trained to write it."""
    encoded = encode_sample(processor, sample, media)
    return processor.tokenizer.decode(encoded["labels"][encoded["labels"] >= 0])


def step_of(processor, size):
    convention = box_convention(processor)
    if convention == "resized_pixels":
        return tuple(1 / side for side in resized_size(processor, size))
    return (STEP[convention],) * 2


def close(found, want, step):
    pairs = enumerate(zip(found, want, strict=True))
    return all(abs(one - other) <= step[place % 2] + 1e-9 for place, (one, other) in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_processor_and_model_say_the_same_convention(families, family):
    model, processor = families[family]
    assert box_convention(processor) == family_of(model).boxes


SHARE = st.floats(0, 1)
SIZES = st.tuples(st.integers(20, 150), st.integers(20, 150))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15)
@given(size=SIZES, shares=st.lists(SHARE, min_size=4, max_size=4), point=st.booleans(), epoch=st.integers(0, 9))
def test_what_the_model_reads_back_is_the_box_within_rounding(families, family, size, shares, point, epoch):
    """At odd sizes, as the file has it and as crop and flip move it."""
    processor = families[family][1]
    (x1, x2), (y1, y2) = sorted(shares[:2]), sorted(shares[2:])
    values = (x1, y1) if point else (x1, y1, x2, y2)
    box = Box(values=tuple(value * size[place % 2] for place, value in enumerate(values)))
    sample, media = sample_of(box), Media(images=(blank(size),))
    resized = resized_size(processor, size) if box_convention(processor) == "resized_pixels" else None
    (found,) = read_boxes(answered(processor, sample, media), convention=box_convention(processor), resized=resized)
    assert close(found.values, values, step_of(processor, size))

    moving = augmentation_of({"crop": {"area": [0.5, 1.0]}, "flip": True})
    moved, cut = augment(sample, media, moving, seed=0, epoch=epoch)
    new = cut.images[0].size
    resized = resized_size(processor, new) if resized else None
    (found,) = read_boxes(answered(processor, moved, cut), convention=box_convention(processor), resized=resized)
    assert close(found.values, relative_values(moved.boxes[0], size=new), step_of(processor, new))


@settings(max_examples=60)
@given(size=st.tuples(st.integers(4, 300), st.integers(4, 300)), most=st.integers(1, 200))
def test_the_resized_size_is_the_one_of_the_processor_s_grid(size, most):
    _, processor = FIRST_CLASS["qwen2_5_vl"]()
    worker = processor.image_processor
    worker.size = {"shortest_edge": 8**2, "longest_edge": 200 * 8**2}
    limit_pixels(processor, most * 8**2)
    grid = worker(images=[blank(size)], return_tensors="pt")["image_grid_thw"][0]
    assert resized_size(processor, size) == (int(grid[2]) * worker.patch_size, int(grid[1]) * worker.patch_size)


def test_max_pixels_moves_the_numbers_of_qwen2_5_and_of_no_other(families):
    box = Box(values=(20, 20, 60, 60))
    media = Media(images=(blank((80, 80)),))
    for family, moves in (("qwen2_5_vl", True), ("qwen2_vl", False)):
        processor = FIRST_CLASS[family]()[1]
        processor.image_processor.size = {"shortest_edge": 8**2, "longest_edge": 100 * 8**2}
        before = answered(processor, sample_of(box), media)
        limit_pixels(processor, 25 * 8**2)
        assert (answered(processor, sample_of(box), media) != before) is moves
    assert before.startswith("It is <|box_start|>(250,250),(750,750)<|box_end|>.")


def test_without_boxes_nothing_is_touched(processor):
    text = "At [0.1, 0.2, 0.5, 0.6], that is <box>[[1, 2, 3, 4]]</box>."
    assert answered(processor, sample_of(answer=text), Media(images=(blank((8, 8)),))).startswith(text)


def test_boxes_of_several_pictures_and_turns_find_their_places(processor):
    turns = (
        Turn(role="user", text="<image><image> What is at <box>?"),
        Turn(role="assistant", text="What is at <box> too."),
    )
    boxes = (Box(values=(5, 5), picture=1), Box(values=(0, 0, 10, 10)))
    first, second = with_boxes(processor, turns, boxes, [(20, 40), (10, 10)])
    assert first.text == "<image><image> What is at [0.5, 0.5]?"
    assert second.text == "What is at [0.0, 0.0, 0.5, 0.25] too."


def boxed(tmp_path, boxes, *, name="a.png", **fields):
    rows = [row(), row(human("<image>Where?"), gpt("At" + " <box>" * len(boxes)), image=name, boxes=boxes, **fields)]
    return write_lines(tmp_path / "a.jsonl", rows)


def test_boxes_lie_in_the_upright_picture(tmp_path, processor):
    turned = Image.new("RGB", (40, 20), "white")
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "a.jpg", exif=exif)
    path = boxed(tmp_path, [[10, 20, 20, 40]], name="a.jpg")
    dataset = load_dataset(path, processor=processor)
    assert "At [0.5, 0.5, 1.0, 1.0]" in processor.tokenizer.decode(dataset[1]["input_ids"])
    assert check_data(path).error_count == 0
    with pytest.raises(DataError, match="lies outside picture 0, which is 20 x 40"):
        load_dataset(boxed(tmp_path, [[10, 10, 40, 20]], name="a.jpg"), processor=processor)


def test_units(tmp_path, processor):
    picture(tmp_path / "a.png", (40, 20))
    units = {"pixels": [10, 5, 20, 10], "fraction": [0.25, 0.25, 0.5, 0.5], "thousandths": [250, 250, 500, 500]}
    for unit, values in units.items():
        dataset = load_dataset(boxed(tmp_path, [values], box_unit=unit), processor=processor)
        assert "At [0.25, 0.25, 0.5, 0.5]" in processor.tokenizer.decode(dataset[1]["input_ids"])


def test_a_very_large_picture_is_decoded_at_half_its_size_and_its_boxes_with_it(tmp_path, processor):
    Image.new("L", (9000, 7200), 255).save(tmp_path / "a.jpg", quality=10)
    dataset = load_dataset(boxed(tmp_path, [[4500, 3600, 9000, 7200]], name="a.jpg"), processor=processor)
    assert "At [0.5, 0.5, 1.0, 1.0]" in processor.tokenizer.decode(dataset[1]["input_ids"])


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([0, 0, 41, 5], "lies outside picture 0, which is 40 x 20 (unit: pixels); correct it"),
        ([-1, 3], "lies outside picture 0"),
        ([10, 0, 5, 5], "is reversed; expected x1, y1, x2, y2"),
        ([0, 0, float("nan"), 5], "NaN or infinite"),
        ([0, float("inf")], "NaN or infinite"),
        ([1, 2, 3], "no list of 2 or 4 numbers"),
    ],
)
def test_a_bad_box_is_reported_and_refused_by_its_line(tmp_path, processor, box, words):
    picture(tmp_path / "a.png", (40, 20))
    path = boxed(tmp_path, [box])
    report = check_data(path, processor=processor)
    assert report.error_count == 1
    assert f"{path}:2: sample 1" in report.errors[0]
    assert words in report.errors[0]
    with pytest.raises(DataError) as caught:
        load_dataset(path, processor=processor)
    assert f"{path}:2: sample 1" in str(caught.value)
    assert words in str(caught.value)
    assert len(load_dataset(path, processor=processor, on_error="skip", max_skipped=1)) == 1


def test_a_check_counts_boxes_and_names_the_convention(tmp_path, processor):
    picture(tmp_path / "a.png", (40, 20))
    path = boxed(tmp_path, [[0, 0, 4, 4], [1, 1]])
    with_model, alone = check_data(path, processor=processor), check_data(path)
    assert (with_model.boxes, with_model.convention) == (2, "fraction")
    assert (alone.boxes, alone.convention) == (2, "")
    dataset = load_dataset(path, processor=processor)
    assert with_model.lengths["max"] == max(len(dataset[index]["input_ids"]) for index in range(2))
    unopened = check_data(boxed(tmp_path, [[0, 0, 400, 4]]), open_media=False)
    assert unopened.error_count == 0


def test_questions_hold_their_boxes(tmp_path, families):
    picture(tmp_path / "a.png", (40, 20))
    rows = [row(human("<image>What is at <box>?"), gpt("As at <box>."), image="a.png", boxes=[[10, 5], [0, 0, 20, 20]])]
    path = write_lines(tmp_path / "a.jsonl", rows)
    (question,) = load_dataset(path, processor=families["qwen2_vl"][1]).questions()
    assert load_dataset(path, processor=families["qwen2_vl"][1]).boxes == "thousandths"
    assert load_dataset(write_lines(tmp_path / "b.jsonl", [row()]), processor=families["llava"][1]).boxes is None
    assert question.prompt[0].text == "<image>What is at <|box_start|>(250,250)<|box_end|>?"
    assert question.reference == "As at (0,0),(500,1000)."


def test_augmented_samples_of_a_file_keep_their_boxes_on_what_they_mark(tmp_path, processor):
    """A white rectangle on black: the box that the model is told is where the white is, in every epoch."""
    canvas = np.zeros((90, 120, 3), dtype=np.uint8)
    canvas[20:50, 30:80] = 255
    Image.fromarray(canvas).save(tmp_path / "a.png")
    rows = [row(human("<image>Where?"), gpt("At <box>."), image="a.png", boxes=[[30, 20, 80, 50]])]
    dataset = load_dataset(write_lines(tmp_path / "a.jsonl", rows), processor=processor)
    dataset.augment_with({"crop": {"area": [0.4, 0.9], "aspect": [0.5, 2]}, "flip": True}, seed=0)
    said = set()
    for epoch in range(8):
        dataset.set_epoch(epoch)
        encoded = dataset[0]
        text = processor.tokenizer.decode(encoded["input_ids"])
        (box,) = read_boxes(text, convention="fraction")
        said.add(box.values)
        pixels = encoded["pixel_values"][0].mean(0)
        bright = (pixels > (pixels.min() + pixels.max()) / 2).nonzero()
        side = pixels.shape[0]
        edges = torch.stack([bright.min(0).values, bright.max(0).values + 1]) / side
        found = (edges[0, 1], edges[0, 0], edges[1, 1], edges[1, 0])
        assert all(abs(float(one) - other) <= 1.01 / side for one, other in zip(found, box.values, strict=True))
    assert len(said) == 8


def test_rows_may_name_their_picture(tmp_path, processor):
    for number in (0, 1):
        picture(tmp_path / f"{number}.png", (10 + 10 * number, 10))
    rows = [
        row(human("<image><image>Where?"), gpt("<box> <box>"), images=["0.png", "1.png"], boxes=boxes)
        for boxes in (
            [{"image": 1, "box": [10, 5]}, [10, 10]],
            [{"picture": 1, "values": [10, 5]}, {"box": [10, 10]}],
        )
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    texts = [processor.tokenizer.decode(item["input_ids"]) for item in load_dataset(path, processor=processor)]
    assert all("[0.5, 0.5] [1.0, 1.0]" in text for text in texts)
    assert json.loads(path.read_text().splitlines()[0])["boxes"][0]["image"] == 1


def test_other_boxes_make_another_sample(tmp_path):
    """Alike but for a box: no duplicate, and no leak unless the box of the question is the same."""
    picture(tmp_path / "a.png", (40, 20))

    def write(name, *boxes):
        said = (human("<image>What is at <box>?"), gpt("A dog, as at <box>."))
        rows = [row(*said, id=f"{name}{number}", image="a.png", boxes=pair) for number, pair in enumerate(boxes)]
        return write_lines(tmp_path / f"{name}.jsonl", rows)

    path = write("a", [[1, 1], [2, 2]], [[1, 1], [3, 3]], [[5, 5], [2, 2]], [[1, 1], [2, 2]])
    report = check_data(path, eval_path=write("held", [[5, 5], [9, 9]], [[7, 7], [2, 2]]))
    assert report.found["duplicate"] == 1
    assert report.found["leak"] == 1
    assert f"{path}:3: sample 2" in next(message for message in report.errors if "held" in message)
    changes = mend_data(path, tmp_path / "out.jsonl")
    assert [(change["change"], change["line"]) for change in changes] == [("duplicate removed", 4)]


def test_a_mended_copy_is_without_boxes_outside_their_pictures(tmp_path):
    picture(tmp_path / "a.png", (40, 20))
    changes = mend_data(boxed(tmp_path, [[0, 0, 41, 5]]), tmp_path / "out.jsonl")
    assert [(change["change"], change["line"]) for change in changes] == [("sample dropped", 2)]
    assert "lies outside picture 0" in changes[0]["why"]
    assert check_data(tmp_path / "out.jsonl").error_count == 0
