import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.evaluation.text import edit_distance, normalise, tokens


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("The Cat, sat!", "cat sat"),
        ("  two\n words\t", "two words"),
        ("\uff21\uff22\uff23\uff11", "abc1"),
        ("“quoted”…", "quoted"),
        ("你好。", "你好"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("3.5", "3.5"),
        ("7.", "7"),
        ("1,000", "1000"),
        ("1,000,000.50", "1000000.50"),
        ("10:30", "10 30"),
        ("3,5", "3 5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("5-6", "5 6"),
        ("well-known", "wellknown"),
        ("A", "a"),
        ("the", "the"),
        ("(A)", "a"),
        ("an apple", "apple"),
        ("?", "?"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_what_counts_of_a_text(text, want):
    assert normalise(text) == want


@settings(deadline=None)
@given(st.text())
def test_normalising_twice_changes_nothing_that_counts(text):
    """Not of the string itself: `\u0345` and its like casefold into letters that NFKC joins anew."""
    assert normalise(text) == " ".join(normalise(text).split())
    assert bool(normalise(text)) == bool(text.strip())


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("这是一只猫。", ["这", "是", "一", "只", "猫"]),
        ("3 只 cats", ["3", "只", "cats"]),
        ("3只cats", ["3", "只", "cats"]),
        ("カタカナとひらがな", list("カタカナとひらがな")),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
        ("한국어 단어", ["한국어", "단어"]),
        ("", []),
    ],
)
def test_words_and_chinese_characters(text, want):
    assert tokens(text) == want


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("北京市", "北京", 1), ("same", "same", 0)],
)
def test_known_edit_distances(one, other, want):
    assert edit_distance(one, other, limit=99) == want
    assert edit_distance(other, one, limit=99) == want


short = st.text("abc", max_size=8)


@settings(deadline=None)
@given(short, short, short)
def test_the_edit_distance_is_a_distance(one, other, third):
    distance = edit_distance(one, other, limit=99)
    assert (distance == 0) == (one == other)
    assert distance == edit_distance(other, one, limit=99)
    assert distance <= edit_distance(one, third, limit=99) + edit_distance(third, other, limit=99)
    assert abs(len(one) - len(other)) <= distance <= max(len(one), len(other))


@settings(deadline=None)
@given(short, short, st.integers(1, 8))
def test_a_limit_only_cuts_the_edit_distance(one, other, limit):
    assert edit_distance(one, other, limit=limit) == min(edit_distance(one, other, limit=99), limit)
