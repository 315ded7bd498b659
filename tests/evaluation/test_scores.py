import json

import pytest

from mmpeft.core.errors import DataError, RecipeError
from mmpeft.data.types import Question, Turn
from mmpeft.evaluation.scores import prompt_text, score_answers


def question(identifier, reference, kind="", text="<image>\nWhat?", images=("a.png",)):
    turns = (Turn(role="user", text=text),)
    return Question(id=identifier, prompt=turns, images=images, reference=reference, kind=kind)


def test_scores_overall_by_kind_and_one_by_one():
    questions = [
        question("1", "seven", "数字"),
        question("2", "odd", "parity", text="Odd or even?", images=()),
        question("3", "three", "数字", images=("a.png", "b.png")),
    ]
    scores = score_answers(questions, ["Seven", "even", "tree"], ["exact_match", "anls"])
    assert scores["metrics"] == {"exact_match": pytest.approx(1 / 3), "anls": pytest.approx((1 + 0 + 0.8) / 3)}
    assert list(scores["by_kind"]) == ["数字", "parity"]
    assert scores["by_kind"]["数字"] == {"count": 2, "exact_match": 0.5, "anls": pytest.approx(0.9)}
    assert scores["by_kind"]["parity"] == {"count": 1, "exact_match": 0, "anls": 0}
    assert scores["predictions"][1] == {
        "id": "2",
        "image": None,
        "images": [],
        "kind": "parity",
        "prompt": "Odd or even?",
        "answer": "even",
        "reference": "odd",
        "exact_match": 0,
        "anls": 0,
    }
    assert scores["predictions"][2]["image"] == "a.png"
    assert scores["predictions"][2]["images"] == ["a.png", "b.png"]
    assert scores["predictions"][0]["prompt"] == "What?"
    assert json.loads(json.dumps(scores)) == scores


def test_a_longer_prompt_shows_who_said_what():
    turns = [
        Turn(role="user", text="<image>\nWhat is it?"),
        Turn(role="assistant", text="A cat."),
        Turn(role="user", text="Of what colour?"),
    ]
    assert prompt_text(turns) == "user: What is it?\nassistant: A cat.\nuser: Of what colour?"


def test_scoring_nothing_is_an_error():
    with pytest.raises(DataError, match=r"no held-out question .* expected at least one"):
        score_answers([], [], ["exact_match"])


def test_an_answer_for_each_question():
    with pytest.raises(DataError, match="found 1 answers for 2 questions"):
        score_answers([question("1", "a"), question("2", "b")], ["a"], ["exact_match"])


def test_an_unknown_metric_is_named_before_anything_is_scored():
    with pytest.raises(RecipeError, match="anlss"):
        score_answers([], [], ["anlss"])
