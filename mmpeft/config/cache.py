"""The `data.cache` block: what is kept between epochs, stages and runs because it does not change."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mmpeft.config.block import Block, no_bool


class CacheConfig(Block):
    """What is kept, where, and how much of it."""

    features: Literal["auto", True, False] = "auto"
    """Keep what frozen towers make of each sample's media; `auto`: where more than one pass reads it."""
    tokens: bool = True
    """Keep the tokens of each sample's text in memory."""
    directory: Path | None = None
    """Default: MMPEFT_CACHE, else `mmpeft` in HF_HOME, else `~/.cache/mmpeft`."""
    limit_bytes: Annotated[int, BeforeValidator(no_bool)] = Field(default=20 * 2**30, ge=0)
    """Bytes on disk that features may take; the oldest that the run does not use go first."""
