"""What a layout is, and what a caller may say about a file's rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmpeft.data.rows import Draft
from mmpeft.data.types import Role


@dataclass(frozen=True, kw_only=True)
class Tags:
    """What a conversation's keys and speakers are called, where a file departs from LLaVA's names.

    Attributes:
        speaker, text: the keys of a turn.
        roles: what the file calls "user", "assistant" and "system", by our own names; empty for LLaVA's.
    """

    speaker: str = "from"
    text: str = "value"
    roles: Mapping[Role, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the caller, or a `dataset_info.json`, says about a file's rows.

    Attributes:
        question: the user's text where rows hold only a medium and what is said of it; None for the default.
        tags: names inside a conversation.
    """

    question: str | None = None
    tags: Tags = field(default_factory=Tags)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which rows hold samples.

    Attributes:
        name: what reports call it.
        needs: the key of each thing it cannot do without, by what else that key may be called.
        keys: all keys that it reads.
        draft: a row to what it holds; raises `UnusableError`.
        fits: whether a row that has all it needs is of this layout, where the keys do not tell.
    """

    name: str
    needs: Mapping[str, tuple[str, ...]]
    keys: tuple[str, ...]
    draft: Callable[[Mapping[str, Any], Options], Draft]
    fits: Callable[[Mapping[str, Any]], bool] = bool

    def found(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The row's own names of what the layout needs, as many as are there."""
        named = (next((key for key in names if row.get(key) is not None), "") for names in self.needs.values())
        return tuple(filter(None, named))

    def lacks(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """What the layout needs and the row does not have."""
        return tuple(what for what, names in self.needs.items() if not any(row.get(key) is not None for key in names))
