"""Metrics of short answers as local `evaluate.Metric`s: nothing is fetched, nothing is left on the disk."""

import abc
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from mmpeft.config.names import did_you_mean
from mmpeft.core.errors import RecipeError
from mmpeft.evaluation.text import edit_distance, tokens

ANLS_THRESHOLD = 0.5
"""Normalised distance from which an answer counts as wrong altogether (Biten et al. 2019, arXiv:1905.13648)."""

_INPUTS = """
    predictions: list of str.
    references: for each prediction a str, or a list of str of which the best one counts.
"""
_FEATURES = [
    datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")}),
    datasets.Features({"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}),
]


class TextMetric(evaluate.Metric, abc.ABC):
    """A metric whose value is the mean of a score per answer, each in 0..1, higher is better.

    A subclass has a `NAME` (under which `compute` returns the mean), a `CITATION` and a `score` of one pair.
    Answers are kept in memory, so that processes side by side do not meet in a cache file.
    """

    NAME: str
    CITATION: str

    def __init__(self, config_name: str | None = None) -> None:
        # evaluate 0.4.6 makes a cache directory even where all is kept in memory.
        with tempfile.TemporaryDirectory() as unused:
            super().__init__(config_name=config_name, keep_in_memory=True, cache_dir=unused, seed=0)

    @staticmethod
    @abc.abstractmethod
    def score(prediction: str, reference: str) -> float:
        """How right one answer is, 0..1."""

    @classmethod
    def score_one(cls, prediction: str, references: str | Sequence[str]) -> float:
        """The score against the reference that fits best."""
        several = [references] if isinstance(references, str) else references
        return max((cls.score(prediction, reference) for reference in several), default=0.0)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.CITATION,
            inputs_description=_INPUTS,
            features=_FEATURES,
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[Any]) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {self.NAME: sum(self.score_one(*pair) for pair in pairs) / max(len(predictions), 1)}


class ExactMatch(TextMetric):
    """1 where answer and reference have the same words after normalisation (`text.normalise`), else 0."""

    NAME = "exact_match"
    CITATION = "Rajpurkar et al. 2016, SQuAD: 100,000+ Questions for Machine Comprehension of Text, arXiv:1606.05250"

    @staticmethod
    def score(prediction: str, reference: str) -> float:
        """1.0 or 0.0."""
        return float(tokens(prediction) == tokens(reference))


class TokenF1(TextMetric):
    """Harmonic mean of precision and recall over the words of answer and reference, as SQuAD defines it.

    Words are those of `text.tokens`: after normalisation, Chinese and Japanese by characters.
    """

    NAME = "token_f1"
    CITATION = ExactMatch.CITATION

    @staticmethod
    def score(prediction: str, reference: str) -> float:
        """2PR / (P + R); two texts without words are alike."""
        said, wanted = tokens(prediction), tokens(reference)
        shared = sum((Counter(said) & Counter(wanted)).values())
        if not said or not wanted:
            return float(said == wanted)
        return 2 * shared / (len(said) + len(wanted))


class Anls(TextMetric):
    """Average normalised Levenshtein similarity: 1 - NL where NL < 0.5, else 0 (Biten et al. 2019, equation 1).

    NL is the edit distance over the length of the longer text, both in lower case with single spaces.
    """

    NAME = "anls"
    CITATION = "Biten et al. 2019, Scene Text Visual Question Answering, ICCV, arXiv:1905.13648"

    @staticmethod
    def score(prediction: str, reference: str) -> float:
        """0.0, or above 0.5; two empty texts are alike."""
        said, wanted = (" ".join(text.casefold().split()) for text in (prediction, reference))
        longer = max(len(said), len(wanted))
        if not longer:
            return 1.0
        wrong_from = math.ceil(longer * ANLS_THRESHOLD)
        distance = edit_distance(said, wanted, limit=wrong_from)
        return 1 - distance / longer if distance < wrong_from else 0.0


METRICS: dict[str, type[TextMetric]] = {metric.NAME: metric for metric in (ExactMatch, TokenF1, Anls)}
"""Name in a recipe's `evaluate.metrics` -> metric."""


def load_metric(name: str) -> TextMetric:
    """The metric of this name, ready to `compute(predictions=..., references=...)`.

    Raises:
        RecipeError: no metric has this name.
    """
    if name not in METRICS:
        raise RecipeError(f"evaluate.metrics: unknown metric {name!r}{did_you_mean(name, METRICS)}")
    return METRICS[name]()
