"""Two answers made comparable: what of a text counts, and how far two texts lie apart."""

import re
import unicodedata
from string import punctuation

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_SIGN = re.compile(r"(?<![\w.])-(?=\d)")
_KEPT = {"-": "\ue000", ".": "\ue001"}
"""Private-use characters that stand in for a sign and a decimal point while punctuation is removed."""

_CJK = (
    r"\u3040-\u30ff"  # hiragana, katakana
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # ideographs of the basic plane
    r"\U00020000-\U0003fffd"  # and of the planes above
)
_TOKEN = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


def normalise(text: str) -> str:
    """A text without what does not count: case, width, punctuation, English articles, runs of white space.

    This is SQuAD's `normalize_answer` (Rajpurkar et al. 2016, arXiv:1606.05250, evaluate-v1.1.py), with
    Unicode's punctuation beside ASCII's, and

    - from the VQA evaluation (Antol et al. 2015, arXiv:1505.00468, vqaEval.py): the point in 3.5 stays, and the
      comma in 1,000 goes;
    - other punctuation between two digits parts them: 10:30 is not 1030;
    - a minus sign before a number stays: -5 is not 5;
    - a step that would leave nothing is left out, so that the choice "A" is not taken for an article.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)[^\w\s.](?=\d)", " ", text)
    text = _or_before(_without_punctuation(text), text)
    return _or_before(_ARTICLES.sub(" ", text), text)


def _or_before(after: str, before: str) -> str:
    return " ".join(after.split()) or " ".join(before.split())


def _without_punctuation(text: str) -> str:
    kept = re.sub(r"(?<=\d)\.(?=\d)", _KEPT["."], _SIGN.sub(_KEPT["-"], text))
    kept = "".join(
        character
        for character in kept
        if character not in punctuation and not unicodedata.category(character).startswith("P")
    )
    return kept.replace(_KEPT["-"], "-").replace(_KEPT["."], ".")


def tokens(text: str) -> list[str]:
    """The words of a normalised text; a Chinese or Japanese character is a word of its own, as in CMRC 2018.

    (Cui et al. 2019, arXiv:1810.07366.) Scripts without spaces beside these two, such as Thai, are one word.
    """
    return _TOKEN.findall(normalise(text))


def edit_distance(one: str, other: str, *, limit: int) -> int:
    """Levenshtein distance (insert, delete, replace; each costs 1), or `limit` where it is at least that.

    Row by row of the table of prefixes (Wagner and Fischer 1974), until no cell of a row is below `limit`:

              ''  s  i  t
        ''     0  1  2  3
        s      1  0  1  2      <- previous
        a      2  1  1  2      <- current
    """
    if abs(len(one) - len(other)) >= limit:
        return limit
    previous = list(range(len(other) + 1))
    for row, left in enumerate(one, start=1):
        current = [row]
        for column, right in enumerate(other, start=1):
            replaced = previous[column - 1] + (left != right)
            current.append(min(replaced, previous[column] + 1, current[-1] + 1))
        if min(current) >= limit:
            return limit
        previous = current
    return min(previous[-1], limit)
