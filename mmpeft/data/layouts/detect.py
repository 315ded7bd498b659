"""Which layout the rows of a file have, by the keys of the first that can be used."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmpeft.config.names import did_you_mean, nearest
from mmpeft.data.layouts.alpaca import ALPACA, QUERY
from mmpeft.data.layouts.base import Layout
from mmpeft.data.layouts.llava import LLAVA
from mmpeft.data.layouts.messages import MESSAGES
from mmpeft.data.layouts.pairs import PAIRS
from mmpeft.data.layouts.triples import CAPTIONS, COLUMNS, TRIPLES
from mmpeft.data.rows import UnusableError

LAYOUTS: Sequence[Sequence[Layout]] = ((LLAVA, MESSAGES, PAIRS), (ALPACA, QUERY, TRIPLES), (CAPTIONS,))
"""All layouts; one of an earlier group is preferred, for it says more than those after it."""

KEYS = tuple(dict.fromkeys(key for group in LAYOUTS for layout in group for key in layout.keys))
"""Every key that some layout reads: what a column map may map to."""

_KEYS_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Detected:
    """A layout, and what in the file says so."""

    layout: Layout
    why: str


def detect_layout(row: Any, columns: Collection[str] = ()) -> Detected | None:
    """The layout of one row; None where the row alone does not tell.

    Args:
        row: a decoded row, its columns renamed.
        columns: the keys that a column map gave; a layout that needs one of them comes first.

    Raises:
        UnusableError: it could be one of two.
    """
    if not isinstance(row, dict):
        return None
    groups = [[layout for layout in group if not layout.lacks(row) and layout.fits(row)] for group in LAYOUTS]
    meant = [layout for group in groups for layout in group if set(layout.found(row)) & set(columns)]
    for fitting in [meant] if meant else groups:
        if not fitting:
            continue
        first = fitting[0]
        for other in fitting[1:]:
            if not set(first.found(row)) & set(other.found(row)):
                raise UnusableError(_ambiguous(row, first, other))
        return Detected(layout=first, why=f"rows hold {_listed(first.found(row))}")
    return None


def _ambiguous(row: Mapping[str, Any], first: Layout, other: Layout) -> str:
    key = first.found(row)[0]
    return (
        f"rows hold {_listed(first.found(row))} ({first.name}) and {_listed(other.found(row))} ({other.name}); "
        f"say which is meant, such as columns: {{{next(iter(first.needs))}: {key}}}"
    )


def unknown_layout(row: Any) -> str | None:
    """Why a row is of no known layout, and what the nearest lacks; None if it is rather a faulty LLaVA row."""
    if not isinstance(row, dict) or set(row) <= set(LLAVA.keys) or _misspelt(row):
        return None
    layouts = [layout for group in LAYOUTS for layout in group]
    best = max(layouts, key=lambda layout: (len(layout.found(row)), _likeness(layout, row)))
    lacking = " and ".join(_called(what, best.needs[what]) for what in best.lacks(row))
    return (
        f"rows hold {_listed(tuple(row))}, which is no layout that is known; the nearest is {best.name}, which lacks "
        f"{lacking}: rename the keys, or name them in `columns`"
    )


def _misspelt(row: Mapping[str, Any]) -> bool:
    """Whether a key is `conversations` but for a letter or two."""
    return bool(difflib.get_close_matches("conversations", [str(key) for key in row], cutoff=0.8))


def _likeness(layout: Layout, row: Mapping[str, Any]) -> int:
    return sum(bool(nearest(name, row)) for names in layout.needs.values() for name in names)


def _called(what: str, names: tuple[str, ...]) -> str:
    return f"`{what}`" if names == (what,) else f"the {what} ({', '.join(f'`{name}`' for name in names)})"


def _listed(keys: Sequence[str]) -> str:
    """Keys for a message; those of a foreign row may be anything."""
    shown = [f"`{str(key)[:40].encode('utf-8', 'replace').decode()}`" for key in keys[:_KEYS_SHOWN]]
    return ", ".join(shown) + (f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else "")


def check_columns(columns: Mapping[str, str], row: Any) -> None:
    """See that a column map maps to keys that layouts read, from keys that the row has.

    Raises:
        UnusableError: it does not.
    """
    for key, name in columns.items():
        if key not in KEYS:
            raise UnusableError(
                f"the column map maps {name!r} to {key!r}, which no layout reads{did_you_mean(key, KEYS)}"
            )
        if isinstance(row, dict) and name not in row:
            raise UnusableError(f"the column map names {name!r}, which is no key of the rows{did_you_mean(name, row)}")


def renamed(row: Any, columns: Mapping[str, str]) -> Any:
    """The row under the names of `columns`; what else could be taken for a mapped column is left out."""
    if not columns or not isinstance(row, dict):
        return row
    hidden = {name for names in COLUMNS.values() if set(names) & set(columns) for name in names}
    taken = set(columns.values()) | hidden | set(columns)
    kept = {key: value for key, value in row.items() if key not in taken}
    return kept | {key: row.get(name) for key, name in columns.items()}
