import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.errors import DataError
from mmpeft.data.formats import parse_row, read_rows, read_samples
from mmpeft.data.types import Sample, Turn
from tests.data.files import gpt, human, row, write_json, write_lines

FILE = Path("train.json")


def parsed(value):
    return parse_row(value, file=FILE, index=3, line=12)


def test_a_row_becomes_a_sample():
    sample = parsed(row(human("<image>\n这是什么?"), gpt("一只猫 🐈"), id="猫", image="猫.png", kind="animal"))
    assert sample == Sample(
        id="猫",
        turns=(Turn(role="user", text="<image>\n这是什么?"), Turn(role="assistant", text="一只猫 🐈")),
        images=("猫.png",),
        kind="animal",
        index=3,
        line=12,
    )


def test_one_picture_without_a_placeholder_goes_before_the_first_human_text():
    sample = parsed(row({"from": "system", "value": "s"}, human("描述这张图片"), gpt("猫"), image="a.png"))
    assert [turn.text for turn in sample.turns] == ["s", "<image>\n描述这张图片", "猫"]


@pytest.mark.parametrize("fields", [{"images": ["a.png"]}, {"image": ["a.png"]}, {"images": "a.png"}])
def test_pictures_may_stand_under_either_key_alone_or_in_a_list(fields):
    assert parsed(row(**fields)).images == ("a.png",)


@pytest.mark.parametrize("fields", [{}, {"image": None}, {"images": []}])
def test_a_text_only_row_has_no_pictures(fields):
    assert parsed(row(**fields)).images == ()


def test_id_and_kind_have_defaults_and_numbers_are_ids():
    assert (parsed(row()).id, parsed(row()).kind, parsed(row(id=7)).id) == ("3", "", "7")


def test_user_and_assistant_are_synonyms():
    turns = parsed(row({"from": "user", "value": "q"}, {"from": "assistant", "value": "a"})).turns
    assert [turn.role for turn in turns] == ["user", "assistant"]


BAD = {
    "2 pictures but 1 <image> placeholder; write one <image> for each": row(
        human("<image> hi"), gpt("a"), images=["a", "b"]
    ),
    "0 pictures but 1 <image> placeholder;": row(human("<image> hi"), gpt("a")),
    "2 pictures but 0 <image> placeholders": row(images=["a", "b"]),
    "1 picture but 2 <image> placeholders": row(human("<image><image>"), gpt("a"), image="a"),
    "a picture, but no `conversations`": {"image": "a.png"},
    "no `conversations`; add human and gpt turns": {},
    "did you mean `conversations` by `conversation`?": {"conversation": []},
    "a picture, but an empty conversation": {"image": "a", "conversations": []},
    "an empty conversation; expected at least": {"conversations": []},
    "`conversations` is a string; expected a list": {"conversations": "x"},
    "turn 1 (from gpt) has an empty text": row(human("q"), gpt(" \n")),
    "turn 0 is from 'humam'; did you mean 'human'?": row({"from": "humam", "value": "q"}, gpt("a")),
    "turn 0 is from 'xyz'; valid names: human, gpt": row({"from": "xyz", "value": "q"}, gpt("a")),
    "turns 0 and 1 are both from human; expected human and gpt in turn": row(human("q"), human("q"), gpt("a")),
    "turns 1 and 2 are both from gpt": row(human("q"), gpt("a"), gpt("b")),
    "the first turn is from gpt; expected a human turn": row(gpt("a"), human("q"), gpt("b")),
    "the last turn is from human; expected a gpt turn": row(human("q"), gpt("a"), human("q")),
    "the last turn is from system": row({"from": "system", "value": "s"}),
    "turn 2 is a system turn; expected it in the first place": row(
        human("q"), gpt("a"), {"from": "system", "value": "s"}
    ),
    "turn 1 (assistant) holds <image>; pictures stand in human turns only": row(human("q"), gpt("<image>"), image="a"),
    "turn 0 is a string; expected an object with `from` and `value`": {"conversations": ["hi"]},
    "turn 0 has no `from` (its keys: `role`, `content`)": {"conversations": [{"role": "u", "content": "c"}]},
    "the text of turn 0 is a list; expected a string": row({"from": "human", "value": []}, gpt("a")),
    "`from` of turn 0 is a number": row({"from": 1, "value": "q"}, gpt("a")),
    "`image` holds a number; expected a path": row(image=3),
    "`images` holds null; expected a path": row(images=[None]),
    "`image` holds an empty path": row(image=""),
    "both `image` and `images` are given": row(image="a", images=["a"]),
    "`kind` is a number; expected a string": row(kind=1),
    "`id` is a boolean; expected a string": row(id=True),
    "the text of turn 0 holds half of a surrogate pair (U+D83D at character 2)": row(human("a \ud83d"), gpt("a")),
    "found a list; expected an object with `conversations`": [],
    "found null; expected an object": None,
}


@pytest.mark.parametrize("message", BAD)
def test_every_structural_problem_names_place_finding_and_fix(message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        parsed(BAD[message])
    assert str(caught.value).startswith("train.json:12: sample 3")


def test_the_id_is_named_too():
    with pytest.raises(DataError, match=re.escape("train.json:12: sample 3 (id 'x'): an empty conversation")):
        parsed({"id": "x", "conversations": []})


def test_unknown_keys_are_reported_beside_the_sample(tmp_path):
    path = write_json(tmp_path / "a.json", [row(source="web"), row()])
    assert [item.ignored for item in read_rows(path)] == [("source",), ()]


@pytest.mark.parametrize("writer", [write_json, write_lines])
def test_samples_know_index_and_line(tmp_path, writer):
    path = writer(tmp_path / "a.json", [row(id="a"), row(id="b")])
    samples = list(read_samples(path))
    assert [(sample.id, sample.index) for sample in samples] == [("a", 0), ("b", 1)]
    assert [sample.line for sample in samples] == ([2, 15] if writer is write_json else [1, 2])


def test_a_bad_row_keeps_the_others(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [row(id="a"), {"id": "b"}, row(id="c")])
    rows = list(read_rows(path))
    assert [item.sample.id if item.sample else item.problem.line for item in rows] == ["a", 2, "c"]
    with pytest.raises(DataError, match=r"a\.jsonl:2: sample 1 \(id 'b'\): no `conversations`"):
        list(read_samples(path))


@given(st.text())
def test_no_text_is_lost_or_changed(text):
    value = json.loads(json.dumps(row(human("q" + text.replace("<image>", "")), gpt("a"))))
    assert parsed(value).turns[0].text == "q" + text.replace("<image>", "")
