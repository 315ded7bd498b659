import base64
import io

import pytest
from PIL import Image

from mmpeft.pipeline.gallery import MOST_CARDS, MOST_QUESTIONS, MOST_ROWS, build_gallery, thumbnail


def row(identifier, answer, right, images=("a.png",), **extra):
    return {
        "id": identifier,
        "image": images[0] if images else None,
        "images": list(images),
        "kind": "",
        "prompt": "What?",
        "answer": answer,
        "reference": "cat",
        "exact_match": float(right),
        **extra,
    }


def gallery(before, after, root=None, metric="exact_match"):
    return build_gallery({"predictions": before}, {"predictions": after}, metric, root)


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [(False, True, "fixed"), (True, True, "kept"), (False, False, "wrong"), (True, False, "broken")],
)
def test_how_an_answer_changed(before, after, state):
    (card,) = gallery([row("1", "x", before)], [row("1", "y", after)]).cards
    (question,) = card.questions
    assert (question.state, card.states) == (state, {state})
    assert (question.before, question.after, question.truth) == ("x", "y", "cat")


def test_questions_on_one_picture_share_a_card():
    rows = [row("1", "a", True), row("2", "b", False), row("3", "c", True, ("b.png",)), row("4", "d", True, ())]
    cards = gallery(rows, rows).cards
    shown = {tuple(picture.name for picture in card.pictures): len(card.questions) for card in cards}
    assert shown == {("a.png",): 2, ("b.png",): 1, (): 1}


def test_text_questions_do_not_share_a_card():
    rows = [row(str(index), "a", True, ()) for index in range(3)]
    assert len(gallery(rows, rows).cards) == 3


def test_mistakes_are_shown_among_what_was_learned():
    rows = [row(str(index), "a", index not in (40, 41), (f"{index}.png",)) for index in range(50)]
    found = gallery([], rows)
    assert (len(found.cards), found.pictures, found.with_mistakes, found.mistakes_shown) == (MOST_CARDS, 50, 2, 2)
    assert "wrong" in found.cards[0].states
    assert "wrong" not in found.cards[1].states


def test_mistakes_alone_fill_the_gallery():
    rows = [row(str(index), "a", False, (f"{index}.png",)) for index in range(50)]
    assert len(gallery([], rows).cards) == MOST_CARDS


def test_a_card_with_many_questions_keeps_its_mistakes():
    rows = [row(str(index), "a", index != 19) for index in range(20)]
    (card,) = gallery([], rows).cards
    assert (len(card.questions), card.hidden) == (MOST_QUESTIONS, 20 - MOST_QUESTIONS)
    assert "wrong" in card.states


def test_many_questions_a_picture_give_fewer_cards():
    rows = [row(f"{index}-{kind}", "a", True, (f"{index}.png",)) for index in range(30) for kind in range(6)]
    assert len(gallery([], rows).cards) == MOST_ROWS // 6


def test_answers_are_matched_by_place_even_where_ids_repeat():
    before = [row("same", "one", False), row("same", "two", False)]
    after = [row("same", "x", True), row("same", "y", True)]
    (card,) = gallery(before, after).cards
    assert [question.before for question in card.questions] == ["one", "two"]


def test_without_answers_before():
    (card,) = gallery([], [row("1", "a", True)]).cards
    assert (card.questions[0].before, card.questions[0].before_right, card.questions[0].state) == (None, None, "kept")


def test_another_metric_counts_from_one_half():
    rows = [row("1", "a", False, anls=0.6), row("2", "a", False, ("b.png",), anls=0.4)]
    found = gallery([], rows, metric="anls")
    assert found.threshold == 0.5
    assert sorted(card.questions[0].right for card in found.cards) == [False, True]


def test_long_texts_are_cut():
    (card,) = gallery([], [row("1", "word " * 1000, True)]).cards
    assert len(card.questions[0].after) == 401


def decode(picture):
    return Image.open(io.BytesIO(base64.b64decode(picture.uri.partition(",")[2])))


def test_thumbnails(tmp_path):
    Image.new("L", (32, 32), 128).save(tmp_path / "tiny.png")
    Image.effect_noise((1600, 900), 80).convert("RGB").save(tmp_path / "photo.jpg")
    tiny, photo = thumbnail("tiny.png", tmp_path), thumbnail("photo.jpg", tmp_path)
    assert tiny.tiny
    assert tiny.uri.startswith("data:image/png;base64,")
    assert decode(tiny).size == (32, 32)
    assert not photo.tiny
    assert photo.uri.startswith("data:image/jpeg;base64,")
    assert decode(photo).size == (160, 90)
    assert len(photo.uri) < 20_000


def test_a_picture_that_is_gone_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for name in ("gone.png", "broken.png", "../outside.png", "https://example.org/a.png"):
        picture = thumbnail(name, tmp_path)
        assert picture.uri == ""
        assert name in picture.fault
    assert thumbnail("a.png", None).fault == "the folder of the pictures is not recorded"
