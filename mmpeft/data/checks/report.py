"""What a check of a data source found."""

from dataclasses import dataclass, field
from typing import Any

from mmpeft.data.formats import Description

MOST_MESSAGES = 50
"""Messages of a kind that a report spells out; the rest are counted."""


@dataclass(kw_only=True)
class Report:
    """What `check_data` found.

    Attributes:
        samples: usable rows; `errors` names the others.
        pictures, videos, audios: distinct media that were decoded.
        turns: human and gpt turns of the usable rows.
        kinds: usable rows by their `kind`; "" for those without.
        errors: what keeps samples, or the file, from being used, and leaks, each with file and line.
        warnings: what can be used and may not be meant.
        found: how many of each kind of error and warning there are; `errors` and `warnings` spell out at most
            `MOST_MESSAGES` of a kind.
        error_count, warning_count: of all kinds.
        lengths: `unit` ("tokens" or "characters"), `min`, `median`, `p95`, `max` of the usable samples, and `cut`,
            how many are longer than `max_length`; empty without samples.
        answers: the most frequent short answers.
        boxes: boxes and points of the usable rows, looked for in their pictures where these were opened.
        convention: how the model's family writes them; "" without a model, or without boxes.
        source: what was checked, and why it is read so; None if it cannot be read at all.
    """

    samples: int = 0
    pictures: int = 0
    videos: int = 0
    audios: int = 0
    turns: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)
    error_count: int = 0
    warning_count: int = 0
    lengths: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    boxes: int = 0
    convention: str = ""
    source: Description | None = None

    def error(self, kind: str, message: str) -> None:
        """Count an error, and keep it among the first of its kind."""
        self.error_count += 1
        self._add(self.errors, kind, message)

    def warn(self, kind: str, message: str) -> None:
        """Count a warning, and keep it among the first of its kind."""
        self.warning_count += 1
        self._add(self.warnings, kind, message)

    def _add(self, messages: list[str], kind: str, message: str) -> None:
        self.found[kind] = self.found.get(kind, 0) + 1
        if self.found[kind] <= MOST_MESSAGES:
            messages.append(message)
