"""How several samples stand in one row of tokens, and which of them share their beginning.

row        p p p p a a a b b c c c c
segments   [0, 4)             a picture and what stands before both questions
           [4, 7) on [0, 4)   the first question and its answer
           [7, 9) on [0, 4)   the second
           [9, 13)            a sample of its own
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tokens [start, end) of a row; `parent`, if any, is the segment that it continues.

    Attributes:
        start, end: its tokens.
        parent: tokens [start, end) of the segment before it in its sample, which itself continues none.
        blocks: tokens [start, end) of its own that see each other both ways, as the pictures of some families do.
    """

    start: int
    end: int
    parent: tuple[int, int] | None = None
    blocks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tree:
    """A row of samples.

    Attributes:
        segments: in order, without gaps, over the whole row.
        samples: how many samples stand in the row.
        tokens: of all samples, those that are shared counted for each.
        padded: that a batch of the same samples would hold, padding among them.
    """

    segments: tuple[Segment, ...]
    samples: int
    tokens: int
    padded: int
