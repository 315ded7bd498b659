"""Tensors of a batch that stay in the host's memory when the batch goes to the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OnHost:
    """Values that are read one by one on the host, which would wait for the device at each of them.

    Neither accelerate 1.15 nor the Trainer nor torch's pinning looks into a dataclass when they move a batch.

    Attributes:
        values: by name.
    """

    values: Mapping[str, Any]
