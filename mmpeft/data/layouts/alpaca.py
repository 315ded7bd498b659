"""Alpaca's rows, as LLaMA-Factory writes them, and ms-swift's rows of a query and a response.

{"instruction": "Which digit?", "input": "", "output": "7", "history": [["Hello", "Hi"]], "system": "…",
 "images": ["a.png"]}
{"query": "<image>Which digit?", "response": "7", "history": []}
"""

from collections.abc import Mapping
from typing import Any

from mmpeft.data.layouts.base import Layout, Options
from mmpeft.data.layouts.objects import KEYS as BOX_KEYS
from mmpeft.data.layouts.objects import boxes_of, with_objects
from mmpeft.data.rows import MEDIA_ROW_KEYS, Draft, UnusableError, kind_of, media_of, said, text_of, with_system
from mmpeft.data.types import Turn

_COMMON = ("id", "history", "system", "kind", *MEDIA_ROW_KEYS, *BOX_KEYS, "objects")


def instruction_draft(row: Mapping[str, Any], options: Options) -> Draft:
    """A row of `instruction`, `input` (put below it) and `output`.

    Raises:
        UnusableError: the row is none.
    """
    question = text_of(row.get("instruction"), "`instruction`")
    if row.get("input") not in (None, ""):
        question = "\n".join(filter(None, (question, text_of(row["input"], "`input`"))))
    return _draft(row, said(question, "`instruction`"), said(row.get("output"), "`output`"))


def query_draft(row: Mapping[str, Any], options: Options) -> Draft:
    """A row of `query` and `response`.

    Raises:
        UnusableError: the row is none.
    """
    return _draft(row, said(row.get("query"), "`query`"), said(row.get("response"), "`response`"))


def _draft(row: Mapping[str, Any], question: str, answer: str) -> Draft:
    turns = (*_history(row.get("history")), Turn(role="user", text=question), Turn(role="assistant", text=answer))
    own = boxes_of(row)
    told, boxes = with_objects(with_system(row, turns), row.get("objects"))
    if own and boxes:
        raise UnusableError("both `boxes` and `objects` are given; keep one of them")
    return Draft(id=row.get("id"), kind=row.get("kind"), turns=told, media=media_of(row), boxes=own or boxes)


def _history(value: Any) -> list[Turn]:
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise UnusableError(f"`history` is {kind_of(value)}; expected a list of [question, answer]")
    turns = []
    for number, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UnusableError(f"entry {number} of `history` is no [question, answer]; write both")
        turns.append(Turn(role="user", text=said(pair[0], f"the question {number} of `history`")))
        turns.append(Turn(role="assistant", text=said(pair[1], f"the answer {number} of `history`")))
    return turns


ALPACA = Layout(
    name="alpaca",
    needs={"instruction": ("instruction",), "output": ("output",)},
    keys=("instruction", "input", "output", *_COMMON),
    draft=instruction_draft,
)
QUERY = Layout(
    name="query and response (ms-swift)",
    needs={"query": ("query",), "response": ("response",)},
    keys=("query", "response", *_COMMON),
    draft=query_draft,
)
