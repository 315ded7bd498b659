"""The frozen types that a sample passes through on its way from a file to the model."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]

IMAGE_PLACEHOLDER = "<image>"
"""Marks a picture's place in a turn's text, in data files; the processor's own token takes its place later."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message; `text` holds an `IMAGE_PLACEHOLDER` where a picture stands."""

    role: Role
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation, as it stands in a data file, checked but without pixels.

    Attributes:
        id: the row's own `id`, else its index as text.
        turns: user and assistant in turn (a system turn may stand first); the last is the assistant's.
        images: picture paths relative to the media root, in the order of the placeholders.
        kind: the row's own `kind`, a label by which evaluation groups its scores; "" if there is none.
        index: the row's place in its file, from 0.
        line: the line of the file where the row starts, from 1.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    kind: str = ""
    index: int
    line: int


@dataclass(frozen=True, kw_only=True)
class Question:
    """One assistant turn of a held-out sample: what stands before it is the prompt, what it says the reference."""

    id: str
    prompt: tuple[Turn, ...]
    images: tuple[str, ...]
    reference: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample that was left out under `on_error: skip`, and why."""

    file: str
    index: int
    line: int
    reason: str
