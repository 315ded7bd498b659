import pytest

from mmpeft.data.sides import Sides


@pytest.mark.parametrize(
    "text",
    [
        "the LEFT one",
        "left-hand side",
        "the rightmost dog",
        "Turn clockwise.",
        "猫在左边",
        "its left's door",
        "(right)",
    ],
)
def test_sides_are_found(text):
    assert Sides().named(text)


@pytest.mark.parametrize("text", ["leftover rice", "a bright, upright cleft", "copyright", "what is it?", "rights"])
def test_other_words_are_not(text):
    assert not Sides().named(text)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Left of the RIGHT-hand dog", "Right of the LEFT-hand dog"),
        ("turn counter-clockwise, then clockwise", "turn clockwise, then counterclockwise"),
        ("猫在左边,狗在右边", "猫在右边,狗在左边"),
        ("the leftmost", "the rightmost"),
    ],
)
def test_sides_change_places(text, want):
    assert Sides().swapped(text) == want


def test_a_user_s_own_words():
    sides = Sides({"links": "rechts", "ostwärts": None})
    assert sides.swapped("Links, nicht rechts; left") == "Rechts, nicht links; right"
    assert sides.named("OSTWÄRTS")
    assert not sides.swappable("ostwärts und links")
    assert sides.swappable("links und rechts")
    assert sides.swapped("ostwärts") == "ostwärts"
