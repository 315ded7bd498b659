import json

import pytest

from mmpeft.config.augment import paraphrase_table
from mmpeft.core.errors import DataError
from mmpeft.data.paraphrases import check_placeholders, paraphrased, read_paraphrases

TABLE = {"What is it?": ("What is it?", "What do you see?")}


def second(count):
    return count - 1


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("What is it?", "What do you see?"),
        ("<image>\nWhat is it?\n", "<image>\nWhat do you see?\n"),
        ("What is it? <image><video>", "What do you see? <image><video>"),
        ("What is it? And why?", "What is it? And why?"),
        ("<image>", "<image>"),
    ],
)
def test_what_is_said_changes_and_placeholders_stay(text, want):
    assert paraphrased(text, TABLE, second) == want


def test_a_text_with_placeholders_inside():
    table = paraphrase_table({"Is <image> like <image>?": ["<image> or <image>?"]})
    assert paraphrased("Is <image> like <image>?", table, second) == "<image> or <image>?"


def test_lists_and_mappings_in_yaml_and_json(tmp_path):
    lists = tmp_path / "lists.yaml"
    lists.write_text("- ['What is it?', 'What do you see?']\n- - Why?\n  - For what reason?\n  - How come?\n")
    table = read_paraphrases(lists)
    assert set(table) == {"What is it?", "What do you see?", "Why?", "For what reason?", "How come?"}
    assert table["How come?"] == ("Why?", "For what reason?", "How come?")
    mapping = tmp_path / "mapping.json"
    mapping.write_text(json.dumps({"What is it?": ["What do you see?"]}), encoding="utf-8")
    assert read_paraphrases(mapping) == TABLE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("just text", "expected texts with lists of alternatives"),
        ("Why?: How come?", "found 'Why?': 'How come?'; expected a text and a list of alternatives"),
        ("- ['Why?']", "expected a list of texts that mean the same"),
        ("- [Why, How]\n- [How, What]", "the text 'How' stands in two places"),
        ("Why?: ['']", "found '' among the texts for 'Why?'"),
        ("a: [", "not valid YAML or JSON"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path, text, words):
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_paraphrases(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    with pytest.raises(DataError, match=r"none\.yaml: cannot be read"):
        read_paraphrases(tmp_path / "none.yaml")


def test_alternatives_hold_the_same_placeholders():
    with pytest.raises(DataError, match="'Where is <box>\\?' holds 1 <box> and its alternative 'Where\\?' 0"):
        check_placeholders(paraphrase_table({"Where is <box>?": ["Where?"]}))
