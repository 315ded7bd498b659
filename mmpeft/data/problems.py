"""What is wrong with single samples of a data file, and the error that lists it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmpeft.core.errors import DataError

LISTED = 10
"""Problems that one error message spells out; the rest are counted."""


MOST_CHARACTERS = 1000
"""Characters of a reason, and of an id, that a message gives: a row may hold millions."""


def shorten(text: str, most: int = MOST_CHARACTERS) -> str:
    """A text, its middle left out if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why one sample cannot be used.

    Attributes:
        index: the row's place in its file, from 0.
        line: the line of the file where the row starts, from 1.
        id: the row's own id; "" if it has none.
        reason: what was found, what was expected, and the fix.
    """

    index: int
    line: int
    id: str = ""
    reason: str

    def located(self, file: Path) -> str:
        """`file:line: sample index (id 'x'): reason`."""
        name = f" (id {shorten(self.id)!r})" if self.id else ""
        return f"{file}:{self.line}: sample {self.index}{name}: {shorten(self.reason)}"


def problems_error(file: Path, problems: Sequence[Problem], *, advice: str) -> DataError:
    """One error that lists the first `LISTED` problems, counts them all, and ends with `advice`."""
    if len(problems) == 1:
        return DataError(f"{problems[0].located(file)}; {advice}")
    listed = "\n".join(f"  {problem.located(file)}" for problem in problems[:LISTED])
    rest = f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return DataError(f"{len(problems)} samples of {file} cannot be used:\n{listed}{rest}\n{advice}")
