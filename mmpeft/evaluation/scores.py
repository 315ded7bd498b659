"""Answers compared with references: overall, by kind of question, one by one."""

from collections.abc import Sequence
from typing import Any

from mmpeft.core.errors import DataError
from mmpeft.data.types import IMAGE_PLACEHOLDER, Question, Turn
from mmpeft.evaluation.metrics import TextMetric, load_metric


def score_answers(questions: Sequence[Question], answers: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    """Scores of one answer a question, in order.

    Returns:
        `{"metrics": {name: mean}, "by_kind": {kind: {"count": n, name: mean}}, "predictions": [{"id", "image",
        "images", "kind", "prompt", "answer", "reference", name: score}]}`, means and scores in 0..1, kinds in the
        order in which they first come up; a question without a kind counts under "".

    Raises:
        RecipeError: a metric that does not exist.
        DataError: no question, or another number of answers.
    """
    loaded = [load_metric(name) for name in metrics]
    if not questions:
        raise DataError("there is no held-out question to score; expected at least one assistant turn in `data.eval`")
    if len(answers) != len(questions):
        raise DataError(f"found {len(answers)} answers for {len(questions)} questions; expected one for each")
    rows = list(zip(questions, answers, strict=True))
    kinds = dict.fromkeys(question.kind for question in questions)
    by_kind = {kind: [row for row in rows if row[0].kind == kind] for kind in kinds}
    return {
        "metrics": _means(loaded, rows),
        "by_kind": {kind: {"count": len(group), **_means(loaded, group)} for kind, group in by_kind.items()},
        "predictions": [_prediction(loaded, question, answer) for question, answer in rows],
    }


def _means(metrics: Sequence[TextMetric], rows: Sequence[tuple[Question, str]]) -> dict[str, float]:
    references, predictions = [question.reference for question, _ in rows], [answer for _, answer in rows]
    return {
        name: value
        for metric in metrics
        for name, value in metric.compute(predictions=predictions, references=references).items()
    }


def _prediction(metrics: Sequence[TextMetric], question: Question, answer: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "image": question.images[0] if question.images else None,
        "images": list(question.images),
        "kind": question.kind,
        "prompt": prompt_text(question.prompt),
        "answer": answer,
        "reference": question.reference,
        **{metric.NAME: metric.score_one(answer, question.reference) for metric in metrics},
    }


def prompt_text(turns: Sequence[Turn]) -> str:
    """A prompt as one text for people: the question alone, or every turn with its role where it is longer."""
    texts = [(turn.role, turn.text.replace(IMAGE_PLACEHOLDER, "").strip()) for turn in turns]
    if len(texts) == 1:
        return texts[0][1]
    return "\n".join(f"{role}: {text}" for role, text in texts)
