"""Charts as inline SVG: lines over steps, and grouped bars of shares. Colours are classes that the page defines.

Numbers are placed in a drawing WIDTH units wide that the page scales; every text from a run is escaped.
"""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from mmpeft.core.units import percent, scientific

WIDTH = 520
_HEIGHT = 270
_LEFT, _RIGHT, _TOP, _FLOOR = 66, 12, 26, 234
"""Of a line chart: room for the y axis, at the right, above; where the x axis lies."""
_LABELS, _BAR, _APART = 116, 16, 15
"""Of a bar chart: room for the labels, a bar with the gap below it, between groups."""
_MOST_POINTS = 400
_MOST_TOOLTIPS = 80
_LOG_FROM = 30
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named line; `style` is its CSS class."""

    name: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Band:
    """A named stretch of the x axis."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A share, 0..1."""

    name: str
    style: str
    value: float


@dataclass(frozen=True, kw_only=True)
class Group:
    """Bars that belong together, with their label and a second, quiet one."""

    label: str
    note: str
    bars: Sequence[Bar]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values lo..hi laid on start..end, straight or by their logarithm."""

    lo: float
    hi: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies; one beyond an end lies on it."""
        lo, hi, at = self.lo, self.hi, min(max(value, self.lo), self.hi)
        if self.log:
            lo, hi, at = math.log(lo), math.log(hi), math.log(at)
        return self.start + (self.end - self.start) * ((at - lo) / (hi - lo) if hi > lo else 0.5)


def ticks(lo: float, hi: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from `lo` to `hi`."""
    if not hi > lo:
        return [lo]
    rough = (hi - lo) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(lo / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(hi / step + 1e-9) + 1)]


def log_ticks(lo: float, hi: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `lo` to `hi`; only the powers where that is more than seven."""
    powers = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    full = [factor * 10.0**power for power in powers for factor in (1, 2, 5) if lo <= factor * 10.0**power <= hi]
    return full if len(full) <= 7 else [10.0**power for power in powers if lo <= 10.0**power <= hi]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Centred moving mean over a twentieth of the points on either side (at least two)."""
    reach = max(2, len(points) // 20)
    smoothed = []
    for index, (x, _) in enumerate(points):
        # The window shrinks evenly on both sides towards the ends, so that a slope stays a slope.
        half = min(reach, index, len(points) - 1 - index)
        window = points[index - half : index + half + 1]
        smoothed.append((x, sum(y for _, y in window) / len(window)))
    return smoothed


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` points, each the mean of its neighbours."""
    if len(points) <= most:
        return list(points)
    edges = [round(index * len(points) / most) for index in range(most + 1)]
    groups = [points[start:end] for start, end in pairwise(edges)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def line_chart(lines: Sequence[Line], *, label: str, x_name: str, y_name: str, bands: Sequence[Band] = ()) -> Markup:
    """Lines with axes, ticks and tooltips; a point that is not finite is left out, no point at all gives "".

    Args:
        label: what a screen reader says of the chart.
        bands: stretches of the x axis, shaded in turn and named at the top.
    """
    kept = [(line, [point for point in line.points if all(map(math.isfinite, point))]) for line in lines]
    values = [y for _, points in kept for _, y in points]
    if not values:
        return Markup("")
    spans = [x for _, points in kept for x, _ in points] + [edge for band in bands for edge in (band.start, band.end)]
    x = Scale(lo=min(spans), hi=max(spans), start=_LEFT, end=WIDTH - _RIGHT)
    y = _value_scale(values)
    parts = [
        *_bands(bands, x),
        *_y_axis(y, y_name),
        *_x_axis(x, x_name),
        *(_path(line.style, thin(points), x, y) for line, points in kept if points),
        *_tooltips([(line.name, thin(points, _MOST_TOOLTIPS)) for line, points in kept], x, x_name),
    ]
    return _drawing(parts, height=_HEIGHT, label=label)


def _value_scale(values: Sequence[float]) -> Scale:
    lo, hi = min(values), max(values)
    if lo > 0 and hi / lo > _LOG_FROM:
        return Scale(lo=lo * 0.9, hi=hi * 1.1, start=_FLOOR, end=_TOP, log=True)
    floor = min(0.0, lo)
    return Scale(lo=floor, hi=hi + (hi - floor) * 0.06 or 1.0, start=_FLOOR, end=_TOP)


def _bands(bands: Sequence[Band], x: Scale) -> Iterable[Markup]:
    for index, band in enumerate(bands):
        start, end = x(band.start), x(band.end)
        name = _cut(band.name, (end - start - 8) / 7)
        yield _tag(
            "g",
            _tag("rect", x=start, y=_TOP, width=end - start, height=_FLOOR - _TOP),
            _text(name, (start + end) / 2, 16, "middle"),
            _tag("title", band.name),
            style=f"band band-{index % 2}",
        )


def _y_axis(y: Scale, name: str) -> Iterable[Markup]:
    for value in log_ticks(y.lo, y.hi) if y.log else ticks(y.lo, y.hi):
        yield _tag("line", style="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y(value), y2=y(value))
        yield _text(number(value), _LEFT - 8, y(value) + 4, "end", "tick")
    place = f"translate(12 {(_TOP + _FLOOR) / 2:.0f}) rotate(-90)"
    shown = f"{name} (logarithmic)" if y.log else name
    yield _tag("text", shown, style="axis", transform=place, text_anchor="middle")


def _x_axis(x: Scale, name: str) -> Iterable[Markup]:
    yield _tag("line", style="base", x1=_LEFT, x2=WIDTH - _RIGHT, y1=_FLOOR, y2=_FLOOR)
    for value in (value for value in ticks(x.lo, x.hi) if value == int(value)):
        yield _text(number(value), x(value), _FLOOR + 16, "middle", "tick")
    yield _text(name, WIDTH - _RIGHT, _HEIGHT - 4, "end", "axis")


def _path(style: str, points: Sequence[Point], x: Scale, y: Scale) -> Markup:
    if len(points) == 1:
        return _tag("circle", style=f"dot {style}", cx=x(points[0][0]), cy=y(points[0][1]), r=3)
    places = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    return _tag("polyline", style=f"line {style}", points=places)


def _tooltips(lines: Sequence[tuple[str, Sequence[Point]]], x: Scale, x_name: str) -> Iterable[Markup]:
    """Columns without colour, each from halfway to the point before to halfway to the next, with a title."""
    rows: dict[float, list[str]] = {}
    for name, points in lines:
        for px, py in points:
            rows.setdefault(px, []).append(f"{name} {number(py)}")
    places = sorted(rows)
    edges = [x.lo, *((one + other) / 2 for one, other in pairwise(places)), x.hi]
    for place, (start, end) in zip(places, pairwise(map(x, edges)), strict=True):
        title = "\n".join([f"{x_name} {number(round(place))}", *rows[place]])
        yield _tag(
            "rect",
            _tag("title", title),
            style="hit",
            x=start,
            y=_TOP,
            width=max(end - start, 1),
            height=_FLOOR - _TOP,
        )


def bar_chart(groups: Sequence[Group], *, label: str) -> Markup:
    """Horizontal bars of shares from 0 to 100 %, group under group; "" without a bar.

    parity      |===                         12.0 %
    100         |=======================     91.0 %

    compare     |...
    """
    if not any(group.bars for group in groups):
        return Markup("")
    x = Scale(lo=0, hi=1, start=_LABELS, end=WIDTH - 70)
    parts: list[Markup] = []
    top = 8.0
    for group in groups:
        height = len(group.bars) * _BAR
        parts.append(
            _tag(
                "g",
                _text(_cut(group.label, 15), _LABELS - 10, top + height / 2 - 2, "end", "name"),
                _text(group.note, _LABELS - 10, top + height / 2 + 12, "end", "tick"),
                _tag("title", f"{group.label}: {group.note}"),
            )
        )
        parts += [_bar(bar, group.label, x, top + index * _BAR) for index, bar in enumerate(group.bars)]
        top += height + _APART
    bottom = top - _APART + 4
    return _drawing([*_share_axis(x, bottom), *parts], height=bottom + 24, label=label)


def _bar(bar: Bar, group: str, x: Scale, top: float) -> Markup:
    share = percent(bar.value)
    end = max(x(bar.value), x.start + 1.5)
    return _tag(
        "g",
        _tag("rect", style=bar.style, x=x.start, y=top, width=end - x.start, height=_BAR - 3, rx=2.5),
        _text(share, end + 6, top + _BAR - 5.5, "start", "value"),
        _tag("title", f"{group}, {bar.name}: {share}"),
        style="bar",
    )


def _share_axis(x: Scale, bottom: float) -> Iterable[Markup]:
    for hundredths in (0, 25, 50, 75, 100):
        at = x(hundredths / 100)
        yield _tag("line", style="grid" if hundredths else "base", x1=at, x2=at, y1=2, y2=bottom)
        yield _text(f"{hundredths} %", at, bottom + 17, "middle", "tick")


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Names beside their colours, as an HTML list, of pairs (name, style)."""
    return _tag("ul", *(_tag("li", _tag("i", style=style), name) for name, style in entries), style="legend")


def number(value: float) -> str:
    """A number for an axis or tooltip: `5,000`, `0.25`, `2e-5`."""
    if abs(value) >= 1000 and value == int(value):
        return f"{value:,.0f}"
    return scientific(value)


def _cut(text: str, columns: float) -> str:
    """The text within so many columns; a wide (Chinese, Japanese, Korean) character takes two."""
    used = 0
    for index, character in enumerate(text):
        used += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used > columns:
            return text[: max(index - 1, 0)].rstrip() + "…"
    return text


def _text(content: str, x: float, y: float, anchor: str, style: str = "") -> Markup:
    return _tag("text", content, style=style, x=x, y=y, text_anchor=anchor)


def _tag(name: str, *content: str | Markup, style: str = "", **attributes: str | float) -> Markup:
    """An element; `style` is its class, content that is no Markup is escaped, numbers get one decimal."""
    shown = {"class": style} if style else {}
    for key, value in attributes.items():
        shown[key.replace("_", "-")] = value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
    opening = Markup("").join(Markup(' {}="{}"').format(Markup(key), value) for key, value in shown.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), opening, Markup("").join(content))


def _drawing(parts: Iterable[Markup], *, height: float, label: str) -> Markup:
    return _tag("svg", *parts, style="chart", viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=label)
