"""Held-out pictures with what was asked, answered and true: which are shown, and small enough to embed."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data.media import load_image

MOST_CARDS = 18
MOST_MISTAKES = 9
"""Of the cards shown, at most so many with a mistake, so that what was learned is seen as well."""

MOST_QUESTIONS = 6
"""Of a card; those answered wrong go first."""

MOST_ROWS = 48
"""Questions of the whole gallery, from which no further card is added."""

THUMBNAIL = 160
"""Longest side in pixels of an embedded picture."""

TINY = 64
"""Up to this longest side a picture is embedded as it is, and enlarged by the page pixel by pixel."""

_LONGEST_TEXT = 400

State = Literal["fixed", "kept", "wrong", "broken"]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture as a data URI; where there is none, `fault` says why."""

    name: str
    uri: str = ""
    fault: str = ""
    tiny: bool = False


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question: wrong before and right after is `fixed`; right before and wrong after is `broken`."""

    prompt: str
    kind: str
    before: str | None
    after: str
    truth: str
    before_right: bool | None
    right: bool

    @property
    def state(self) -> State:
        """How the answer changed; without an answer before, `kept` or `wrong`."""
        if self.right:
            return "fixed" if self.before_right is False else "kept"
        return "broken" if self.before_right else "wrong"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The questions on one picture (or on several that are asked about together)."""

    pictures: Sequence[Picture]
    questions: Sequence[Answered]
    hidden: int = 0

    @property
    def states(self) -> set[State]:
        """The states of its questions."""
        return {question.state for question in self.questions}


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The cards shown, and how many pictures there are in all, with mistakes and without.

    `threshold` is the score from which an answer counts as right; None for exact_match.
    """

    cards: Sequence[Card] = ()
    pictures: int = 0
    with_mistakes: int = 0
    threshold: float | None = None

    @property
    def mistakes_shown(self) -> int:
        """Cards with a question that is answered wrong."""
        return sum(bool(card.states & {"wrong", "broken"}) for card in self.cards)


@dataclass
class _Group:
    names: tuple[str, ...]
    questions: list[Answered] = field(default_factory=list)

    @property
    def mistaken(self) -> bool:
        return not all(question.right for question in self.questions)


def build_gallery(before: Mapping[str, Any], after: Mapping[str, Any], metric: str, media_root: Path | None) -> Gallery:
    """A mix of held-out pictures, those with mistakes among them.

    Args:
        before, after: evaluations as evaluation.json holds them; `before` may be empty.
        metric: the metric by which an answer counts as right: 1 where it is exact_match, else from 0.5 on.
        media_root: the folder of the pictures; None where it is not known.
    """
    threshold = 1.0 if metric == "exact_match" else 0.5
    groups = _groups(before.get("predictions") or [], after.get("predictions") or [], metric, threshold)
    chosen = _mix(groups)
    return Gallery(
        cards=[_card(group, media_root) for group in chosen],
        pictures=len(groups),
        with_mistakes=sum(group.mistaken for group in groups),
        threshold=None if metric == "exact_match" else threshold,
    )


def _groups(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], metric: str, threshold: float
) -> list[_Group]:
    same = [row.get("id") for row in before] == [row.get("id") for row in after]
    by_id = {row.get("id"): row for row in before}
    groups: dict[Any, _Group] = {}
    for index, row in enumerate(after):
        earlier = before[index] if same else by_id.get(row.get("id"), {})
        names = tuple(map(str, row.get("images") or ([row["image"]] if row.get("image") else [])))
        group = groups.setdefault(names or ("", row.get("id")), _Group(names))
        group.questions.append(
            Answered(
                prompt=_short(row.get("prompt")),
                kind=str(row.get("kind") or ""),
                before=_short(earlier["answer"]) if "answer" in earlier else None,
                after=_short(row.get("answer")),
                truth=_short(row.get("reference")),
                before_right=earlier[metric] >= threshold if metric in earlier else None,
                right=row.get(metric, 0) >= threshold,
            )
        )
    return list(groups.values())


def _short(text: Any) -> str:
    shown = "" if text is None else str(text)
    return shown if len(shown) <= _LONGEST_TEXT else shown[:_LONGEST_TEXT] + "…"


def _mix(groups: Sequence[_Group]) -> list[_Group]:
    """Pictures with a mistake and pictures without in turn, in the order of the file."""
    mistaken = [group for group in groups if group.mistaken]
    right = [group for group in groups if not group.mistaken]
    shown = mistaken[: max(MOST_MISTAKES, MOST_CARDS - len(right))]
    rest = right[: MOST_CARDS - len(shown)]
    mixed: list[_Group] = []
    for index in range(max(len(shown), len(rest))):
        mixed += [*shown[index : index + 1], *rest[index : index + 1]]
    rows = accumulate(min(len(group.questions), MOST_QUESTIONS) for group in mixed)
    return [group for group, total in zip(mixed, rows, strict=True) if total <= MOST_ROWS]


def _card(group: _Group, media_root: Path | None) -> Card:
    ordered = sorted(group.questions, key=lambda question: question.right)
    kept = set(map(id, ordered[:MOST_QUESTIONS]))
    return Card(
        pictures=[thumbnail(name, media_root) for name in group.names[:4]],
        questions=[question for question in group.questions if id(question) in kept],
        hidden=len(group.questions) - len(kept),
    )


def thumbnail(name: str, media_root: Path | None) -> Picture:
    """A picture of at most `THUMBNAIL` pixels a side as a data URI, or why there is none."""
    if media_root is None:
        return Picture(name=name, fault="the folder of the pictures is not recorded")
    try:
        image = load_image(name, root=media_root)
    except DataError as error:
        return Picture(name=name, fault=str(error))
    tiny = max(image.size) <= TINY
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if tiny:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=82)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return Picture(name=name, uri=f"data:image/{'png' if tiny else 'jpeg'};base64,{encoded}", tiny=tiny)
