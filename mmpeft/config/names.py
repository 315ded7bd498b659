"""Nearest valid names, for errors that say what was probably meant."""

import difflib
from collections.abc import Iterable


def nearest(name: str, valid: Iterable[str], count: int = 1) -> list[str]:
    """Up to `count` valid names that look like `name`, the most similar first."""
    return difflib.get_close_matches(name, list(valid), n=count, cutoff=0.5)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest valid name, else the list of them all."""
    names = list(valid)
    close = nearest(name, names)
    return f"; did you mean {close[0]!r}?" if close else f"; valid names: {', '.join(names)}"
