"""The recipe's `data` block: where samples come from, and how much of their media is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from mmpeft.config.augment import AugmentConfig
from mmpeft.config.block import Block, no_bool, raise_all
from mmpeft.config.cache import CacheConfig


class MediaConfig(Block):
    """How much of films and recordings is decoded; kept with the adapter, for another rate is another model input."""

    fps: float | None = Field(default=2.0, gt=0)
    """Frames a second of a film that are used at most; null for no such limit."""
    max_frames: int = Field(default=64, ge=1)
    frame_pixels: int | None = Field(default=None, ge=1)
    """Width x height to which frames are scaled down; null leaves that to the processor."""
    sampling_rate: int = Field(default=16_000, ge=1_000)
    max_seconds: float = Field(default=600.0, gt=0)
    """Seconds of the longest recording."""
    too_long: Literal["error", "cut"] = "error"
    use_audio_in_video: bool = False
    """Decode the audio tracks of films too, for models that hear."""


class SourceConfig(Block):
    """One source of samples; `data.train` may have several."""

    path: Path
    weight: Annotated[float, BeforeValidator(no_bool)] = Field(default=1.0, gt=0, le=1000, allow_inf_nan=False)
    """Samples shown an epoch, relative to the number that the source has: 2 shows each twice an epoch, 0.5 one half
    in one epoch and the other half in the next."""
    media_root: Path | None = None
    """Folder that its media paths are relative to; default: `data.media_root`, else its own folder."""
    name: str | None = Field(default=None, min_length=1)
    """What messages and the report call it; default: the file's name without suffix."""
    columns: dict[str, str] | None = None
    """Which column of a table holds what, by our names: `{question: frage, answer: antwort}`."""
    question: str | None = Field(default=None, min_length=1)
    """The question of samples that have none, such as pictures with captions."""


def _sources_kind(value: Any) -> str:
    if isinstance(value, Mapping | SourceConfig):
        return "<source>"
    return "<list>" if isinstance(value, list | tuple) else "<path>"


def _with_path(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


OneSource = Annotated[
    Annotated[Path, Tag("<path>")] | Annotated[SourceConfig, Tag("<source>")], Discriminator(_sources_kind)
]
Sources = Annotated[
    Annotated[Path, Tag("<path>")]
    | Annotated[SourceConfig, Tag("<source>")]
    | Annotated[tuple[Annotated[SourceConfig, BeforeValidator(_with_path)], ...], Tag("<list>")],
    Discriminator(_sources_kind),
]


def _workers_kind(value: Any) -> str:
    return "<word>" if isinstance(value, str) else "<count>"


Workers = Annotated[
    Annotated[Literal["auto"], Tag("<word>")] | Annotated[int, BeforeValidator(no_bool), Field(ge=0), Tag("<count>")],
    Discriminator(_workers_kind),
]


class DataConfig(Block):
    """Where the samples are, and what is done with one that cannot be used."""

    train: Sources
    """A data file; or a list of them, each a path or a block of `path`, `weight` and more."""
    eval: OneSource | None = None
    media_root: Path | None = None
    """Folder that the media paths of all files are relative to; default: each file's own folder."""
    max_length: int | None = Field(default=None, ge=8)
    """Longest row in tokens, pictures included; a longer one is cut at its end, never inside a picture."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Most pixels of a picture that the processor keeps; saved with the adapter's processor. Default: the model's."""
    media: MediaConfig = MediaConfig()
    on_error: Literal["error", "skip"] = "error"
    max_skipped: float = Field(default=0.01, ge=0)
    """With `on_error: skip`, the most samples that may be skipped: a share of the file below 1, else a count."""
    augment: AugmentConfig | None = None
    """How training samples are varied from epoch to epoch; held-out samples never are. Default: not at all."""
    cache: CacheConfig = CacheConfig()
    workers: Workers = "auto"
    """Processes that open media and encode samples ahead of training; 0 does it in the training process. `auto`: on a
    CPU 1, or 0 for text alone; elsewhere up to 8, by the cores at hand."""
    streaming: bool = False
    """Read `train` while training instead of before, for what is too large to be read first; needs `max_steps`."""
    shuffle_buffer: int = Field(default=10_000, ge=1)
    """With `streaming`, rows among which the next one is drawn; 1 keeps the file's order."""

    @field_validator("train", mode="before")
    @classmethod
    def _some_source(cls, value: Any) -> Any:
        if isinstance(value, list | tuple) and not value:
            raise PydanticCustomError("mmpeft", "found an empty list; expected at least one source")
        return value

    @field_validator("eval", mode="before")
    @classmethod
    def _one_held_out(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            raise PydanticCustomError("mmpeft", "found a list; expected one file, whose questions are asked")
        return value

    @field_validator("eval")
    @classmethod
    def _no_weight(cls, value: Any) -> Any:
        if isinstance(value, SourceConfig) and value.weight != 1:
            raise_all([("weight", f"found {value.weight:g}; held-out questions are asked once each: leave it out")])
        return value

    @property
    def alone(self) -> bool:
        """Whether there is one source, each of whose samples an epoch shows once."""
        return len(self.sources) == 1 and self.sources[0].weight == 1

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """`train`, however it was written."""
        if isinstance(self.train, tuple):
            return self.train
        return (self.train if isinstance(self.train, SourceConfig) else SourceConfig(path=self.train),)
