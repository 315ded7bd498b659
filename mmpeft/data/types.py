"""The frozen types that a sample passes through on its way from a file to the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from mmpeft.core.types import MODALITIES, Modality

Role = Literal["system", "user", "assistant"]

IMAGE_PLACEHOLDER = "<image>"
"""Marks a picture's place in a turn's text, in data files; the processor's own token takes its place later."""

PLACEHOLDERS: Mapping[Modality, str] = {modality: f"<{modality}>" for modality in MODALITIES}
"""What marks a picture's, a video's and a recording's place."""

BOX_PLACEHOLDER = "<box>"
"""Marks a box's or point's place in a turn's text, of a sample that has `boxes`; elsewhere it is text."""

WORDS: Mapping[Modality, str] = {"image": "picture", "video": "video", "audio": "recording"}
"""What messages call a medium."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message; `text` holds one of the `PLACEHOLDERS` where a picture, video or recording stands."""

    role: Role
    text: str


BoxUnit = Literal["pixels", "fraction", "thousandths"]
"""What a box's numbers count: pixels of the upright picture, shares of it from 0 to 1, or thousandths of it."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box or a point in a picture, measured from the top left corner, x before y.

    Attributes:
        values: x1, y1, x2, y2 of a box, or x, y of a point. They are places between pixels: the right edge of a
            picture that is 640 wide lies at 640.
        picture: which of the sample's pictures, from 0.
        unit: what the values count.
    """

    values: tuple[float, ...]
    picture: int = 0
    unit: BoxUnit = "pixels"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation, as it stands in a data file, checked but without pixels.

    Attributes:
        id: the row's own `id`, else its index as text.
        turns: user and assistant in turn (a system turn may stand first); the last is the assistant's.
        images, videos, audios: paths relative to the media root, each in the order of its placeholders.
        boxes: what each `<box>` in the turns stands for, in order; written into the text when it is encoded.
        kind: the row's own `kind`, a label by which evaluation groups its scores; "" if there is none.
        index: the row's place in its file, from 0.
        line: the line of the file where the row starts, from 1.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    kind: str = ""
    index: int
    line: int

    @property
    def media(self) -> Mapping[Modality, tuple[str, ...]]:
        """The paths by modality."""
        return {"image": self.images, "video": self.videos, "audio": self.audios}


@dataclass(frozen=True, kw_only=True)
class Audio:
    """A recording, decoded.

    Attributes:
        samples: float32 [samples], mono, from -1 to 1.
        sampling_rate: samples a second.
    """

    samples: np.ndarray
    sampling_rate: int


@dataclass(frozen=True, kw_only=True)
class Video:
    """The frames of a video that are used, decoded.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB.
        indices: place of each frame in the file, from 0.
        fps: frames a second of the file (not of `frames`).
        total_frames: frames that the file holds.
        audio: the audio track, where it was asked for and is there.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    fps: float
    total_frames: int
    audio: Audio | None = None


@dataclass(frozen=True, kw_only=True)
class Media:
    """What a sample's placeholders stand for, decoded, each in the order of its placeholders."""

    images: Sequence[Image.Image] = ()
    videos: Sequence[Video] = ()
    audios: Sequence[Audio] = ()


@dataclass(frozen=True, kw_only=True)
class Question:
    """One assistant turn of a held-out sample: what stands before it is the prompt, what it says the reference."""

    id: str
    prompt: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    reference: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class SkippedSample:
    """A sample that was left out under `on_error: skip`, and why."""

    file: str
    index: int
    line: int
    reason: str
