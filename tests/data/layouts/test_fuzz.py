"""Whatever a row holds, it becomes a sample or a problem with a reason; nothing else is raised."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.core.errors import DataError
from mmpeft.data.formats import parse_row, read_rows
from mmpeft.data.layouts.detect import KEYS, LAYOUTS, detect_layout
from tests.data.files import write_lines

WORDS = ("user", "assistant", "human", "gpt", "system", "<image>q", "<box>", "a.png", "text", "image_url", "real", "")
INNER = (
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "image_url",
    "url",
    "data",
    "ref",
    "bbox",
    "path",
    "answer",
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(WORDS), st.text(max_size=5))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(INNER) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
ROWS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), VALUES, max_size=6) | VALUES
LAYOUT_ROWS = [
    st.fixed_dictionaries(
        {names[0]: VALUES for names in layout.needs.values()},
        optional={key: VALUES for key in layout.keys if key not in {names[0] for names in layout.needs.values()}},
    )
    for group in LAYOUTS
    for layout in group
]


def outcome(function):
    """What a function gives, or the message of its DataError."""
    try:
        return function()
    except DataError as error:
        return str(error)


def parsed(value, path):
    found = outcome(lambda: parse_row(value, file=path, index=0, line=1))
    if isinstance(found, str):
        assert found.startswith(f"{path}:1: sample 0")
        return
    assert found.turns[-1].role == "assistant"
    for names in found.media.values():
        assert all(isinstance(name, str) and name.strip() for name in names)


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_any_row(tmp_path_factory, value):
    parsed(value, tmp_path_factory.getbasetemp() / "a.jsonl")


@pytest.mark.parametrize("rows", LAYOUT_ROWS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_row_with_a_layouts_keys(tmp_path_factory, rows, data):
    parsed(data.draw(rows), tmp_path_factory.getbasetemp() / "a.jsonl")


@settings(max_examples=60, deadline=None)
@given(st.lists(ROWS, max_size=4))
def test_any_file(tmp_path_factory, values):
    path = write_lines(tmp_path_factory.getbasetemp() / "any.jsonl", [])
    path.write_bytes(b"".join(_line(value) for value in values))
    found = outcome(lambda: list(read_rows(path)))
    if isinstance(found, str):
        assert str(path) in found
    else:
        assert [(row.sample or row.problem).index for row in found] == list(range(len(values)))


def _line(value):
    return json.dumps(value).encode() + b"\n"


def test_detection_does_not_depend_on_the_order_of_keys():
    value = {"image": "a.png", "question": "q", "answer": "a", "text": "t"}
    for row in (value, dict(reversed(value.items()))):
        assert detect_layout(row).layout.name == "question and answer columns"
