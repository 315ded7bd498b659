import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.pipeline.charts import (
    Band,
    Bar,
    Group,
    Line,
    Scale,
    bar_chart,
    legend,
    line_chart,
    log_ticks,
    number,
    smooth,
    thin,
    ticks,
)

finite = st.floats(-1e9, 1e9, allow_nan=False)


def parse(markup):
    return ElementTree.fromstring(str(markup))


def numbers(points):
    return [tuple(map(float, pair.split(","))) for pair in points.split()]


@pytest.mark.parametrize(
    ("lo", "hi", "want"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 110, [0, 50, 100]),
        (0, 0.002, [0, 0.0005, 0.001, 0.0015, 0.002]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(lo, hi, want):
    assert ticks(lo, hi) == pytest.approx(want)


@settings(deadline=None)
@given(finite, st.floats(1e-6, 1e9))
def test_ticks_lie_between_the_ends(lo, width):
    found = ticks(lo, lo + width)
    assert len(found) <= 11
    slack = max(width, abs(lo)) * 1e-6
    assert all(lo - slack <= value <= lo + width + slack for value in found)


def test_logarithmic_ticks():
    assert log_ticks(0.08, 6) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert log_ticks(1e-4, 1e4) == pytest.approx([10.0**power for power in range(-4, 5)])


def test_a_scale_maps_its_ends_and_middle():
    straight = Scale(lo=0, hi=10, start=100, end=0)
    assert [straight(value) for value in (0, 5, 10, 99)] == [100, 50, 0, 0]
    log = Scale(lo=0.01, hi=100, start=0, end=10, log=True)
    assert [log(value) for value in (0.01, 1, 100)] == pytest.approx([0, 5, 10])


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=200))
def test_smoothing_keeps_places_and_bounds(values):
    points = [(float(index), value) for index, value in enumerate(values)]
    smoothed = smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    slack = max(map(abs, values)) * 1e-9 + 1e-9
    assert all(min(values) - slack <= y <= max(values) + slack for _, y in smoothed)


def test_smoothing_keeps_a_slope():
    points = [(float(x), 3.0 * x) for x in range(40)]
    assert [y for _, y in smooth(points)] == pytest.approx([y for _, y in points])


def test_thinning_keeps_the_mean_and_the_bound():
    points = [(float(x), float(x % 2)) for x in range(10_000)]
    kept = thin(points, 100)
    assert len(kept) == 100
    assert sum(y for _, y in kept) / 100 == pytest.approx(0.5)
    assert thin(points[:50], 100) == points[:50]


def test_a_line_chart_draws_axes_lines_bands_and_tooltips():
    line = Line(name="loss", style="smooth", points=[(1, 4.0), (2, 2.0), (3, 1.0)])
    bands = [Band(name="one", start=0, end=2), Band(name="two", start=2, end=4)]
    svg = parse(line_chart([line], label="Loss by step", x_name="step", y_name="loss", bands=bands))
    assert (svg.get("role"), svg.get("aria-label")) == ("img", "Loss by step")
    (path,) = [node for node in svg.iter("polyline") if node.get("class") == "line smooth"]
    places = numbers(path.get("points"))
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert [y for _, y in places] == sorted(y for _, y in places)  # SVG's y grows downwards, the loss falls
    titles = [node.text for node in svg.iter("title")]
    assert titles == ["one", "two", "step 1\nloss 4", "step 2\nloss 2", "step 3\nloss 1"]
    texts = [node.text for node in svg.iter("text")]
    for shown in ("one", "two", "step", "loss"):
        assert shown in texts


def test_a_wide_range_is_logarithmic_and_says_so():
    svg = line_chart(
        [Line(name="loss", style="raw", points=[(1, 6.0), (2, 0.1)])], label="", x_name="step", y_name="loss"
    )
    assert "loss (logarithmic)" in svg


def test_what_is_not_finite_is_left_out():
    points = [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)]
    svg = line_chart([Line(name="loss", style="raw", points=points)], label="", x_name="step", y_name="loss")
    assert len(numbers(next(parse(svg).iter("polyline")).get("points"))) == 2
    assert "nan" not in svg
    assert line_chart([Line(name="loss", style="raw", points=[(1, math.nan)])], label="", x_name="", y_name="") == ""
    assert line_chart([], label="", x_name="", y_name="") == ""


def test_one_point_is_a_dot_and_zeros_are_drawn():
    svg = parse(line_chart([Line(name="a", style="raw", points=[(1, 0.0)])], label="", x_name="step", y_name="a"))
    assert len(list(svg.iter("circle"))) == 1


def test_a_long_run_stays_small():
    points = [(float(x), math.sin(x) + 2) for x in range(100_000)]
    svg = line_chart([Line(name="loss", style="raw", points=points)], label="", x_name="step", y_name="loss")
    assert len(svg) < 40_000


def test_bars_are_as_long_as_their_shares():
    bars = [Bar(name="before", style="c-before", value=0.0), Bar(name="after", style="c-last", value=0.5)]
    full = [Bar(name="after", style="c-last", value=1.0)]
    svg = parse(
        bar_chart(
            [
                Group(label="all", note="8 questions", bars=bars),
                Group(label="颜色与形状颜色与形状", note="4 questions", bars=full),
            ],
            label="Accuracy",
        )
    )
    widths = [float(node.get("width")) for node in svg.iter("rect")]
    assert widths[0] < 2
    assert widths[1] == pytest.approx(widths[2] / 2, abs=0.1)
    titles = [node.text for node in svg.iter("title")]
    assert "all, after: 50.0 %" in titles
    assert "颜色与形状颜色与形状: 4 questions" in titles
    assert "颜色与形状颜…" in [node.text for node in svg.iter("text")]
    assert bar_chart([], label="") == bar_chart([Group(label="a", note="", bars=[])], label="") == ""


def test_every_text_is_escaped():
    evil = '<script>alert("&")</script>'
    line = Line(name=evil, style="raw", points=[(1, 1.0), (2, 2.0)])
    charts = [
        line_chart([line], label=evil, x_name=evil, y_name=evil, bands=[Band(name=evil, start=0, end=300)]),
        bar_chart([Group(label=evil, note=evil, bars=[Bar(name=evil, style="c-1", value=1)])], label=evil),
        legend([(evil, "c-1")]),
    ]
    for chart in charts:
        assert "<script" not in chart
        parse(chart)


def test_numbers_on_axes():
    assert [number(value) for value in (0, 0.25, 2e-5, 5000, 12.5)] == ["0", "0.25", "2e-5", "5,000", "12.5"]
