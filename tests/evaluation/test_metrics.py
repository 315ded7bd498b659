import os
import subprocess
import sys

import evaluate
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpeft.core.errors import RecipeError
from mmpeft.evaluation.metrics import METRICS, load_metric


def value(name, prediction, reference):
    return load_metric(name).compute(predictions=[prediction], references=[reference])[name]


@pytest.mark.parametrize(
    ("prediction", "reference", "want"),
    [
        ("The answer.", "answer", 1),
        ("ANSWER", "answer", 1),
        ("answers", "answer", 0),
        ("一只 猫。", "一只猫", 1),
        ("一只狗", "一只猫", 0),
        ("7.", "7", 1),
        ("3.5", "35", 0),
        ("10:30", "1030", 0),
        ("-5", "5", 0),
        ("1,000", "1000", 1),
        ("", "", 1),
        ("", "yes", 0),
        ("", "A", 0),
        ("the", "A", 0),
        ("A.", "a", 1),
        ("?", "!", 0),
        ("7", ["eight", "seven", "7"], 1),
        ("9", ["eight", "seven", "7"], 0),
    ],
)
def test_exact_match(prediction, reference, want):
    assert value("exact_match", prediction, reference) == want


@pytest.mark.parametrize(
    ("prediction", "reference", "want"),
    [
        ("the cat sat", "cat sat down", 0.8),
        ("cat", "cat", 1),
        ("dog", "cat", 0),
        ("cat cat", "cat", 2 / 3),
        ("一只黑猫", "一只猫", 6 / 7),
        ("", "", 1),
        ("", "cat", 0),
        ("cat", "", 0),
        ("red car", ["blue car", "red car"], 1),
    ],
)
def test_token_f1(prediction, reference, want):
    assert value("token_f1", prediction, reference) == pytest.approx(want)


@pytest.mark.parametrize(
    ("prediction", "reference", "want"),
    [
        ("Receipt", "receipt", 1),
        ("reciept", "receipt", 1 - 2 / 7),
        ("12.50", "12.80", 0.8),
        ("ab", "ac", 0),  # NL is 0.5, and a score takes NL below it
        ("abc", "abd", 2 / 3),
        ("total  12", "total 12", 1),
        ("北京市", "北京", 2 / 3),
        ("x", "receipt", 0),
        ("", "", 1),
        ("", "a", 0),
        ("", "a long reference", 0),
        ("invoice", ["receipt", "invoices"], 1 - 1 / 8),
    ],
)
def test_anls(prediction, reference, want):
    assert value("anls", prediction, reference) == pytest.approx(want)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_the_mean_of_its_scores(name):
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric)
    mean = metric.compute(predictions=["cat", "dog"], references=["cat", "horse"])
    assert mean == {name: 0.5}
    assert type(mean[name]) is float
    metric.add_batch(predictions=["cat"], references=[["cat"]])
    metric.add(prediction="dog", reference=["horse", "dog"])
    assert metric.compute() == {name: 1.0}


@pytest.mark.parametrize("name", METRICS)
@settings(deadline=None)
@given(prediction=st.text(max_size=20), reference=st.text(max_size=20))
def test_scores_lie_between_none_and_all(name, prediction, reference):
    metric = METRICS[name]
    assert 0 <= metric.score(prediction, reference) <= 1
    assert metric.score(prediction, reference) == pytest.approx(metric.score(reference, prediction))
    assert metric.score(reference, reference) == 1
    assert metric.score_one(prediction, [reference, prediction]) == 1


@pytest.mark.parametrize("name", METRICS)
def test_no_reference_scores_nothing(name):
    assert METRICS[name].score_one("cat", []) == 0


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(RecipeError, match=r"unknown metric 'exactmatch'; did you mean 'exact_match'\?"):
        load_metric("exactmatch")
    with pytest.raises(RecipeError, match="unknown metric 'x'; valid names: exact_match, token_f1, anls"):
        load_metric("x")


def test_metrics_side_by_side_do_not_meet():
    one, other = load_metric("exact_match"), load_metric("exact_match")
    one.add_batch(predictions=["a", "b"], references=["a", "b"])
    other.add_batch(predictions=["a"], references=["b"])
    assert (one.compute()["exact_match"], other.compute()["exact_match"]) == (1, 0)


def test_nothing_is_left_in_the_home(tmp_path):
    program = (
        "from mmpeft.evaluation.metrics import METRICS, load_metric\n"
        "for name in METRICS: assert load_metric(name).compute(predictions=['a'], references=['a'])[name] == 1"
    )
    environment = {key: item for key, item in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert [path for path in tmp_path.rglob("*") if "metrics" in path.parts or path.is_file()] == []
