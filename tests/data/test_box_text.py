import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.errors import DataError
from mmpeft.data.box_text import read_boxes, write_box
from mmpeft.data.types import Box
from mmpeft.families import internvl, qwen2_vl, qwen3_vl

SIZE, RESIZED = (640, 480), (644, 476)
STEP = {"fraction": 0.001, "thousandths": 0.001, "resized_pixels": 1 / 476, "location_tokens": 1 / 512}


def failure(values, unit="pixels"):
    with pytest.raises(DataError) as caught:
        write_box(Box(values=values, unit=unit), size=SIZE, convention="fraction")
    return str(caught.value)


@pytest.mark.parametrize(
    ("convention", "text"),
    [
        ("fraction", "[0.0, 0.0, 0.5, 1.0]"),
        ("thousandths", "[0, 0, 500, 1000]"),
        ("resized_pixels", "[0, 0, 322, 476]"),
        ("location_tokens", "<loc0000><loc0000><loc1023><loc0512>"),
    ],
)
def test_each_convention_writes_the_left_half(convention, text):
    for values, unit in (
        ((0, 0, 320, 480), "pixels"),
        ((0, 0, 0.5, 1), "fraction"),
        ((0, 0, 500, 1000), "thousandths"),
    ):
        box = Box(values=values, unit=unit)
        assert write_box(box, size=SIZE, resized=RESIZED, convention=convention) == text


@pytest.mark.parametrize("convention", list(STEP))
@given(data=st.data())
def test_reading_gives_back_what_was_written_within_rounding(convention, data):
    share = st.floats(0, 1)
    x1, x2 = sorted((data.draw(share), data.draw(share)))
    y1, y2 = sorted((data.draw(share), data.draw(share)))
    values = data.draw(st.sampled_from([(x1, y1, x2, y2), (x1, y1)]))
    text = write_box(Box(values=values, unit="fraction"), size=SIZE, resized=RESIZED, convention=convention)
    (box,) = read_boxes(f"The cat is at {text}.", convention=convention, resized=RESIZED)
    assert box.values == pytest.approx(values, abs=STEP[convention])


@pytest.mark.parametrize(
    ("spec", "box", "point"),
    [
        (qwen2_vl.SPEC, "<|box_start|>(0,0),(500,1000)<|box_end|>", "<|box_start|>(500,1000)<|box_end|>"),
        (internvl.SPEC, "<box>[[0, 0, 500, 1000]]</box>", "[500, 1000]"),
        (qwen3_vl.SPEC, "[0, 0, 500, 1000]", "[500, 1000]"),
    ],
)
def test_each_notation_is_written_and_read(spec, box, point):
    for values, text in (((0, 0, 0.5, 1), box), ((0.5, 1), point)):
        notation, given = spec.box_notation, Box(values=values, unit="fraction")
        assert write_box(given, size=SIZE, convention="thousandths", notation=notation) == text
        assert read_boxes(f"There: {text}, (see below)", convention="thousandths") == (given,)


def test_bad_boxes_say_what_is_wrong():
    assert "NaN or infinite" in failure((0, 0, math.nan, 1))
    assert "is reversed" in failure((10, 0, 5, 1))
    assert "box [0, 0, 641, 1] lies outside picture 0, which is 640 x 480 (unit: pixels)" in failure((0, 0, 641, 1))
    assert "has 3 values" in failure((0, 0, 1))
    with pytest.raises(DataError, match="need the size to which the processor resizes"):
        write_box(Box(values=(0, 0)), size=SIZE, convention="resized_pixels")


def test_a_model_s_rubbish_is_left_out():
    assert read_boxes("[5, 5, 2, 9] [1, 2, 3] [0, 0, 2000, 10] none", convention="thousandths") == ()
