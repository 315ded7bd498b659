"""ms-swift's rows of `conversation`: pairs of what a human and an assistant say.

{"system": "…", "conversation": [{"human": "<image>Which digit?", "assistant": "7"}, …], "images": ["a.png"]}
"""

from collections.abc import Mapping
from typing import Any

from mmpeft.data.layouts.base import Layout, Options
from mmpeft.data.rows import MEDIA_ROW_KEYS, Draft, UnusableError, kind_of, media_of, said, with_system
from mmpeft.data.types import Turn


def draft(row: Mapping[str, Any], options: Options) -> Draft:
    """A row of `conversation`.

    Raises:
        UnusableError: the row is none.
    """
    pairs = row.get("conversation")
    if not isinstance(pairs, list):
        raise UnusableError(f"`conversation` is {kind_of(pairs)}; expected a list of pairs")
    if not pairs:
        raise UnusableError("an empty conversation; expected at least one pair of `human` and `assistant`")
    turns: list[Turn] = []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, dict):
            raise UnusableError(f"pair {number} is {kind_of(pair)}; expected an object with `human` and `assistant`")
        turns.append(Turn(role="user", text=said(pair.get("human"), f"`human` of pair {number}")))
        turns.append(Turn(role="assistant", text=said(pair.get("assistant"), f"`assistant` of pair {number}")))
    return Draft(id=row.get("id"), kind=row.get("kind"), turns=with_system(row, tuple(turns)), media=media_of(row))


def _holds_pairs(row: Mapping[str, Any]) -> bool:
    """Whether `conversation` is this layout's, not LLaVA's `conversations` misspelt."""
    pairs = row.get("conversation")
    return isinstance(pairs, list) and bool(pairs) and isinstance(pairs[0], dict) and "human" in pairs[0]


PAIRS = Layout(
    name="pairs of human and assistant (ms-swift)",
    needs={"conversation": ("conversation",)},
    keys=("id", *MEDIA_ROW_KEYS, "conversation", "system", "kind"),
    draft=draft,
    fits=_holds_pairs,
)
