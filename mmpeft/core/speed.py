"""What a stage did to be fast, for its records and the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """One of the things that make training faster and change nothing else.

    Attributes:
        name: the recipe's key that switches it, such as `batch.packing`.
        on: whether it was in use.
        why: what decided that, in one sentence: "samples of the family qwen2_audio cannot share a row".
        saved: what it spared, by name and unit: {"tokens": 120_000, "bytes": 3_000_000, "seconds": 12.5}; empty if
            it was off.
    """

    name: str
    on: bool
    why: str
    saved: Mapping[str, float] = field(default_factory=dict)
