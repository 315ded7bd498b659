"""Samples varied from epoch to epoch, for small data: other words, parts of pictures, mirrored pictures, other colours.

    what is drawn depends on          recipe's seed, operation, sample, epoch
    and not on                        worker, process, order, what else is switched on

So a run that goes on from a checkpoint sees what it would have seen, and `mmpeft data show --augment` shows it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from mmpeft.config.augment import AugmentConfig, ColourConfig, CropConfig, FlipConfig
from mmpeft.config.load import Document, describe, load_yaml
from mmpeft.core.errors import RecipeError
from mmpeft.core.hashing import hash_value
from mmpeft.data.altered import coloured_media, crop_window, cropped_film, cropped_images, mirrored_media
from mmpeft.data.boxes import cropped, holds_places, mirrored, pixel_values
from mmpeft.data.paraphrases import check_placeholders, paraphrased, read_paraphrases
from mmpeft.data.sides import sides_of
from mmpeft.data.types import Media, Sample


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How samples are varied; what is None, or empty, is not done. Made by `augmentation_of`.

    Attributes:
        crop, colour, flip: as the recipe's `data.augment` has them.
        paraphrases: for a user's text, without white space and placeholders around it, all that may stand in its
            place, itself among them.
    """

    crop: CropConfig | None = None
    colour: ColourConfig | None = None
    flip: FlipConfig | None = None
    paraphrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for input hashes."""
        blocks = {"crop": self.crop, "colour": self.colour, "flip": self.flip}
        plain = {name: block.model_dump(mode="json") for name, block in blocks.items() if block is not None}
        return {**plain, "paraphrases": {text: list(options) for text, options in self.paraphrases.items()}}


AugmentSettings = AugmentConfig | Mapping[str, Any] | Augmentation | None
"""What `augmentation_of` takes."""


def augmentation_of(value: AugmentSettings) -> Augmentation | None:
    """A recipe's `data.augment` block, or plain values of the same keys, with its file of paraphrases read.

    Raises:
        RecipeError: every problem of the values at once, each with its key.
        DataError: the file cannot be read, or an alternative holds other placeholders than its text.
    """
    if value is None or isinstance(value, Augmentation):
        return value
    if not isinstance(value, AugmentConfig):
        value = _validated(value, Document(value=value, source="augment"))
    table = value.paraphrase or {}
    table = read_paraphrases(table) if isinstance(table, Path) else table
    check_placeholders(table)
    return Augmentation(crop=value.crop, colour=value.colour, flip=value.flip, paraphrases=table)


def read_augmentation(path: Path) -> tuple[Augmentation, int]:
    """The augmentation that a recipe's `data.augment` asks for, or a YAML file of its keys alone; and its seed.

    Raises:
        RecipeError: the file cannot be read, a recipe has no such block, or a problem of the block, with its line.
        DataError: as `augmentation_of`.
    """
    document = load_yaml(path)
    block: Any = {key: value for key, value in document.value.items() if key != "seed"}
    before, seed = 0, document.value.get("seed", 0)
    if {"model", "data", "stages"} & set(block):
        data = block.get("data")
        block, before = data.get("augment") if isinstance(data, Mapping) else None, 2
        if block is None:
            raise RecipeError(f"{path}: the recipe has no `data.augment`; add it, or give a file of its keys alone")
    lines = {
        place[before:]: line for place, line in document.lines.items() if place[:before] in ((), ("data", "augment"))
    }
    found = _validated(block, Document(value=block, source=str(path), lines=lines))
    settings = augmentation_of(found)
    assert settings is not None
    return settings, seed if isinstance(seed, int) else 0


def _validated(value: Mapping[str, Any], document: Document) -> AugmentConfig:
    try:
        return AugmentConfig.model_validate(value)
    except ValidationError as error:
        raise RecipeError(describe(error, AugmentConfig, document)) from None


@dataclass(frozen=True, kw_only=True)
class Varied:
    """What an epoch makes of a sample.

    Attributes:
        notes: what was done, and what was left because it would be wrong, in a few words each.
    """

    sample: Sample
    media: Media
    notes: tuple[str, ...] = ()


def varies_media(settings: Augmentation | AugmentConfig | None) -> bool:
    """Whether any medium is varied; else texts are at most."""
    return settings is not None and any((settings.crop, settings.colour, settings.flip))


def augment(sample: Sample, media: Media, settings: Augmentation, *, seed: int, epoch: int) -> tuple[Sample, Media]:
    """A sample and its media as epoch `epoch` (from 0) has them.

    Left as they are, each for what would be wrong otherwise:
        mirrored or cropped    a sample whose text holds boxes or points as numbers ([0.1, 0.2, 0.5, 0.6])
        mirrored               one whose text names a side, unless `flip.sided` is `swap`
        any of it              a kind that the operation's `except_kinds` names
    Boxes (`sample.boxes`) move with their picture; a crop never cuts one: it is moved, or grown, to hold them all.

    Raises:
        DataError: a box that lies outside its picture.
    """
    varied = augment_with_notes(sample, media, settings, seed=seed, epoch=epoch)
    return varied.sample, varied.media


def augment_with_notes(sample: Sample, media: Media, settings: Augmentation, *, seed: int, epoch: int) -> Varied:
    """As `augment`, with what was done; errors as there."""
    draw = _Draws(seed, sample, epoch)
    varied = Varied(sample=sample, media=media)
    if settings.paraphrases:
        varied = _said_otherwise(varied, settings.paraphrases, draw("paraphrase"))
    seen = bool(media.images or media.videos)
    if seen and settings.crop is not None and _happens(settings.crop, sample, draw("crop?")):
        varied = _cropped(varied, settings.crop, draw("crop"))
    if seen and settings.flip is not None and _happens(settings.flip, sample, draw("flip")):
        varied = _mirrored(varied, settings.flip)
    if seen and settings.colour is not None and _happens(settings.colour, sample, draw("colour?")):
        coloured = coloured_media(varied.media, settings.colour, draw("colour"))
        varied = replace(varied, media=coloured, notes=(*varied.notes, "other colours"))
    return varied


class _Draws:
    """A generator of its own for each operation on a sample in an epoch."""

    def __init__(self, seed: int, sample: Sample, epoch: int) -> None:
        self._place = [seed, sample.index, sample.id, epoch]

    def __call__(self, operation: str) -> np.random.Generator:
        return np.random.default_rng(int(hash_value([*self._place, operation])[:32], 16))


def _happens(block: CropConfig | ColourConfig | FlipConfig, sample: Sample, draws: np.random.Generator) -> bool:
    return bool(draws.random() < block.probability) and sample.kind not in block.except_kinds


def _noted(varied: Varied, note: str) -> Varied:
    return replace(varied, notes=(*varied.notes, note))


def _fixed(sample: Sample) -> bool:
    """Whether the text holds places that could not be moved along."""
    return any(holds_places(turn.text) for turn in sample.turns)


def _said_otherwise(varied: Varied, table: Mapping[str, tuple[str, ...]], draws: np.random.Generator) -> Varied:
    sample = varied.sample
    turns = tuple(
        replace(turn, text=paraphrased(turn.text, table, lambda count: int(draws.integers(count))))
        if turn.role == "user"
        else turn
        for turn in sample.turns
    )
    if turns == sample.turns:
        return varied
    return _noted(replace(varied, sample=replace(sample, turns=turns)), "other words")


def _cropped(varied: Varied, crop: CropConfig, draws: np.random.Generator) -> Varied:
    """Every picture and film cut to a window of its own."""
    sample, media = varied.sample, varied.media
    if _fixed(sample):
        return _noted(varied, "not cropped: its text holds places as numbers")
    sizes = [image.size for image in media.images]
    places = [(box.picture, pixel_values(box, size=sizes[box.picture])) for box in sample.boxes]
    windows = [
        crop_window(size, crop, draws, keep=[values for picture, values in places if picture == number])
        for number, size in enumerate(sizes)
    ]
    boxes = tuple(cropped(box, size=sizes[box.picture], window=windows[box.picture]) for box in sample.boxes)
    videos = tuple(cropped_film(video, crop, draws) for video in media.videos)
    media = replace(media, images=cropped_images(media.images, windows), videos=videos)
    return replace(
        varied, sample=replace(sample, boxes=boxes), media=media, notes=(*varied.notes, f"cropped to {_said(windows)}")
    )


def _said(windows: Sequence[tuple[int, int, int, int]]) -> str:
    """Where the crops lie: width x height + left + top of each, as X geometries have it."""
    if not windows:
        return "a part"
    return ", ".join(f"{right - left}x{bottom - top}+{left}+{top}" for left, top, right, bottom in windows)


def _mirrored(varied: Varied, flip: FlipConfig) -> Varied:
    """All pictures and films mirrored, and what names a side with them; or nothing, where that cannot be."""
    sample, media = varied.sample, varied.media
    if _fixed(sample):
        return _noted(varied, "not mirrored: its text holds places as numbers")
    sides = sides_of(tuple(flip.words.items()))
    note = "mirrored"
    if any(sides.named(turn.text) for turn in sample.turns):
        if flip.sided == "leave":
            return _noted(varied, "not mirrored: its text names a side")
        if not all(sides.swappable(turn.text) for turn in sample.turns):
            return _noted(varied, "not mirrored: its text names a side that has no opposite")
        turns = tuple(replace(turn, text=sides.swapped(turn.text)) for turn in sample.turns)
        sample, note = replace(sample, turns=turns), "mirrored, left and right swapped in its text"
    boxes = tuple(mirrored(box, size=media.images[box.picture].size) for box in sample.boxes)
    return replace(
        varied, sample=replace(sample, boxes=boxes), media=mirrored_media(media), notes=(*varied.notes, note)
    )
