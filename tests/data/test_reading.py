import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpeft.core.errors import DataError
from mmpeft.data import reading
from mmpeft.data.reading import read_objects

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def values(path):
    return [(located.line, located.value) for located in read_objects(path)]


def failure(path):
    with pytest.raises(DataError) as caught:
        list(read_objects(path))
    return str(caught.value)


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 1]), st.integers(1, 40), st.booleans())
def test_any_array_is_read_with_any_window(tmp_path_factory, rows, indent, chunk, ascii_only):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="replace")
    expected = json.loads(path.read_text(encoding="utf-8"))
    before, reading.CHUNK = reading.CHUNK, chunk
    try:
        assert [value for _, value in values(path)] == expected
    finally:
        reading.CHUNK = before


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_each_object_of_an_array_knows_its_line(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text('[{"a":\n 1},\n\n {"b": "x\\ny"}\n, 3]\n')
    assert values(path) == [(1, {"a": 1}), (4, {"b": "x\ny"}), (5, 3)]


def test_lines_are_read_by_content_or_suffix_and_blank_lines_pass(tmp_path):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n\n{"b": 2}\n')
        assert values(tmp_path / name) == [(1, {"a": 1}), (3, {"b": 2})]


def test_a_byte_order_mark_and_windows_line_ends_are_no_obstacle(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf[\r\n{"a": "\xe7\x8c\xab"}\r\n]')
    assert values(path) == [(2, {"a": "猫"})]


@pytest.mark.parametrize("chunk", [5, 1 << 20])
@pytest.mark.parametrize("keep", range(2, 7))
def test_an_array_cut_anywhere_names_line_and_last_sample(tmp_path, monkeypatch, keep, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    whole = json.dumps([{"id": f"s{n}", "text": "abc", "flag": True} for n in range(8)], indent=1)
    cut = whole.index(f'"s{keep}"') - 3
    for end in range(cut, cut + 40):
        path = tmp_path / "a.json"
        path.write_text(whole[:end])
        message = failure(path)
        last = whole[:end].count("}") - 1
        assert f"after sample {last} (id 's{last}', line {2 + 5 * last})" in message, whole[:end]
        line = whole[:end].rstrip().count("\n") + 1
        assert message.startswith((f"{path}:{line}: the file ends", f"{path}:{line + 1}: the file ends"))
        assert "cut off" in message


def test_an_array_cut_in_its_first_sample(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"id": "x')
    assert failure(path) == (
        f"{path}:2: the file ends in the middle of sample 0 (it starts in line 2), "
        "before the first sample ended; it was cut off: fetch or write it again"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": the file is empty"),
        ("  \n", ": the file is empty"),
        ("3", ":1: found '3'; expected a JSON array"),
        ("[1 2]", ":1: found '2' after sample 0 (line 1); expected a comma or the closing ]"),
        (
            '[{"a": 1},\n{"a" 2}, {"b": 3}, {"c": 4}]',
            ":2: sample 1 is not valid JSON: Expecting ':' delimiter",
        ),
        ("[1]\n x", ":2: found 'x' after the closing ]"),
        ("[" * 100_000, ": sample 0 cannot be read: nested too deeply"),
    ],
)
def test_a_malformed_array_names_its_line(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    assert message in failure(path)


def test_a_bad_line_is_a_fault_of_that_line_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a" 1}\n{"a": 2}\n{"a": ')
    found = list(read_objects(path))
    assert [item.line for item in found if item.fault] == [2, 4]
    assert found[1].fault == "not one JSON object on one line: Expecting ':' delimiter at column 6"
    assert found[3].fault.endswith("was the file cut off?")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_text_that_is_no_utf8_names_the_line_and_byte(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b'{"a": 1}\n{"a": "\xc4\xe3"}\n')
    assert failure(path) == f"{path}:2: not UTF-8 (byte 0xc4 at column 8); save the file as UTF-8"
    path.write_bytes('[{"a": 1}]'.encode("utf-16"))
    assert failure(path) == (
        f"{path}:1: not UTF-8 (byte 0xff at column 1); it looks like UTF-16 text: save it as UTF-8"
    )


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_text_that_is_no_utf8_is_found_wherever_a_piece_of_the_file_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    for bad, column in ((b"\xe7\x8c", 10), (b"\xff", 10), (b"\xed\xa0\x80", 10)):
        (tmp_path / "a.jsonl").write_bytes('{"a": "猫"}\n'.encode() + b'{"a": "\xc3\xa4' + bad + b'"}\n')
        assert f":2: not UTF-8 (byte 0x{bad[0]:02x} at column {column})" in failure(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n"\xe7\x8c')
    assert ":2: not UTF-8 (byte 0xe7 at column 2)" in failure(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_too_large_is_refused_with_its_line(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading, "CHUNK", 100)
    monkeypatch.setattr(reading, "MAX_ROW", 1000)
    monkeypatch.setattr(reading, "MAX_VALUES", 200)
    fits, long, many = {"a": "x" * 900}, {"a": "x" * 1500}, {"a": [0] * 300}
    for row, what in ((long, "1000 characters"), (many, "200 values")):
        rows = [json.dumps(item) for item in (fits, row, fits)]
        path = tmp_path / name
        path.write_text("[" + ",\n".join(rows) + "]" if name == "a.json" else "\n".join(rows))
        if name == "a.jsonl":
            found = list(read_objects(path))
            assert [(item.line, bool(item.fault)) for item in found] == [(1, False), (2, True), (3, False)]
            assert f"has more than {what}; put media into files" in found[1].fault
        else:
            assert f"{path}:2: sample 1, which starts here, has more than {what}" in failure(path)


def test_a_row_of_many_values_is_refused_after_a_long_row_too(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 100)
    monkeypatch.setattr(reading, "MAX_VALUES", 300)
    path = tmp_path / "a.json"
    rows = [{"a": "x" * 5000}, {"a": 1}, {"a": [0] * 400}]
    path.write_text("[" + ",\n".join(json.dumps(item, separators=(",", ":")) for item in rows) + "]")
    with pytest.raises(DataError, match=r"a\.json:3: sample 2, which starts here, has more than 300 values"):
        list(read_objects(path))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_key_said_twice_and_a_number_without_end_are_faults_of_their_row(tmp_path, name):
    rows = ['{"a": 1, "b": 2, "a": 3}', '{"a": {"b": 1, "b": 1}}', '{"a": ' + "9" * 5000 + "}", '{"a": 1}']
    (tmp_path / name).write_text("[" + ",\n".join(rows) + "]" if name == "a.json" else "\n".join(rows))
    found = list(read_objects(tmp_path / name))
    assert [item.line for item in found] == [1, 2, 3, 4]
    assert [item.value for item in found] == [None, None, None, {"a": 1}]
    assert found[0].fault == "the key 'a' stands twice in one object; keep one of the two"
    assert "the key 'b' stands twice" in found[1].fault
    assert "more than 4300 digits" in found[2].fault


def test_a_missing_file_names_what_lies_beside_it(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    assert re.search(r"tain\.json: no such file; data files beside it: train\.json", failure(tmp_path / "tain.json"))
    assert "is a directory; expected a .json" in failure(tmp_path)
