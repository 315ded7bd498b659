"""Samples varied from epoch to epoch, for small data: other words, parts of pictures, mirrored pictures, other colours.

    what is drawn depends on          recipe's seed, operation, sample, epoch
    and not on                        worker, process, order, what else is switched on

So a run that goes on from a checkpoint sees what it would have seen, and `mmpeft data show --augment` shows it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance
from pydantic import ValidationError

from mmpeft.config.augment import AugmentConfig, ColourConfig, CropConfig, FlipConfig
from mmpeft.config.load import Document, describe
from mmpeft.core.errors import RecipeError
from mmpeft.core.hashing import hash_value
from mmpeft.data.boxes import cropped, holds_places, mirrored, pixel_values
from mmpeft.data.media import MAX_ASPECT
from mmpeft.data.paraphrases import check_placeholders, paraphrased, read_paraphrases
from mmpeft.data.sides import sides_of
from mmpeft.data.types import Box, Media, Sample

Size = tuple[int, int]
Window = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


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
        try:
            value = AugmentConfig.model_validate(value)
        except ValidationError as error:
            raise RecipeError(describe(error, AugmentConfig, Document(value=value, source="augment"))) from None
    table = value.paraphrase or {}
    table = read_paraphrases(table) if isinstance(table, Path) else table
    check_placeholders(table)
    return Augmentation(crop=value.crop, colour=value.colour, flip=value.flip, paraphrases=table)


def augment(sample: Sample, media: Media, settings: Augmentation, *, seed: int, epoch: int) -> tuple[Sample, Media]:
    """A sample and its media as epoch `epoch` (from 0) has them.

    Left as they are, each for what would be wrong otherwise:
        mirrored or cropped    a sample whose text holds boxes or points as numbers ([0.1, 0.2, 0.5, 0.6])
        mirrored               one whose text names a side, unless `flip.sided` is `swap`
        any of it              a kind that the operation's `except_kinds` names
    Boxes (`sample.boxes`) move with their picture; a crop never cuts one, it is moved, or grown, to hold them all.

    Raises:
        DataError: a box that lies outside its picture.
    """
    draw = _Draws(seed, sample, epoch)
    if settings.paraphrases:
        sample = _said_otherwise(sample, settings.paraphrases, draw("paraphrase"))
    if settings.crop is not None and _happens(settings.crop, sample, draw("crop?")) and not _fixed(sample):
        sample, media = _cropped(sample, media, settings.crop, draw("crop"))
    if settings.flip is not None and _happens(settings.flip, sample, draw("flip")) and not _fixed(sample):
        sample, media = _flipped(sample, media, settings.flip)
    if settings.colour is not None and _happens(settings.colour, sample, draw("colour?")):
        media = _coloured(media, settings.colour, draw("colour"))
    return sample, media


class _Draws:
    """A generator of its own for each operation on a sample in an epoch."""

    def __init__(self, seed: int, sample: Sample, epoch: int) -> None:
        self._place = [seed, sample.index, sample.id, epoch]

    def __call__(self, operation: str) -> np.random.Generator:
        return np.random.default_rng(int(hash_value([*self._place, operation])[:32], 16))


def _happens(block: CropConfig | ColourConfig | FlipConfig, sample: Sample, draws: np.random.Generator) -> bool:
    return bool(draws.random() < block.probability) and sample.kind not in block.except_kinds


def _fixed(sample: Sample) -> bool:
    """Whether the text holds places that could not be moved along."""
    return any(holds_places(turn.text) for turn in sample.turns)


def _said_otherwise(sample: Sample, table: Mapping[str, tuple[str, ...]], draws: np.random.Generator) -> Sample:
    turns = tuple(
        replace(turn, text=paraphrased(turn.text, table, lambda count: int(draws.integers(count))))
        if turn.role == "user"
        else turn
        for turn in sample.turns
    )
    return replace(sample, turns=turns)


def _cropped(sample: Sample, media: Media, crop: CropConfig, draws: np.random.Generator) -> tuple[Sample, Media]:
    """Every picture and film cut to a window of its own."""
    sizes = [image.size for image in media.images]
    windows = [
        crop_window(
            size, crop, draws, keep=[pixel_values(box, size=size) for box in sample.boxes if box.picture == number]
        )
        for number, size in enumerate(sizes)
    ]
    boxes = tuple(cropped(box, size=sizes[box.picture], window=windows[box.picture]) for box in sample.boxes)
    images = tuple(image.crop(window) for image, window in zip(media.images, windows, strict=True))
    videos = []
    for video in media.videos:
        height, width = video.frames.shape[1:3]
        left, top, right, bottom = crop_window((width, height), crop, draws)
        videos.append(replace(video, frames=np.ascontiguousarray(video.frames[:, top:bottom, left:right])))
    return replace(sample, boxes=boxes), replace(media, images=images, videos=tuple(videos))


def crop_window(
    size: Size, crop: CropConfig, draws: np.random.Generator, *, keep: list[tuple[float, ...]] | None = None
) -> Window:
    """A window within a picture of `size` (width, height).

    Its area is a share of the picture's from `crop.area` (uniform), its width : height the picture's times a factor
    from `crop.aspect` (log-uniform, of those with which the window is no larger than the picture), both but for whole
    pixels.

    Args:
        keep: boxes and points, in pixels, that have to lie inside.
    """
    share = draws.uniform(*crop.area)
    low, high = max(crop.aspect[0], share), min(crop.aspect[1], 1 / share)
    factor = float(np.exp(draws.uniform(np.log(low), np.log(high))))
    scales = (np.sqrt(share * factor), np.sqrt(share / factor))
    spans = []
    for axis, (whole, scale) in enumerate(zip(size, scales, strict=True)):
        inside = [value for values in keep or [] for value in values[axis::2]]
        first = int(np.floor(min(inside))) if inside else whole
        last = int(np.ceil(max(inside))) if inside else 0
        length = min(whole, max(1, round(whole * scale), last - first))
        start = int(draws.integers(max(0, last - length), min(first, whole - length) + 1))
        spans.append((start, start + length))
    (left, right), (top, bottom) = spans
    width, height = right - left, bottom - top
    if max(width, height) > MAX_ASPECT * min(width, height):
        return (0, 0, *size)
    return left, top, right, bottom


def _flipped(sample: Sample, media: Media, flip: FlipConfig) -> tuple[Sample, Media]:
    """All pictures and films mirrored, and what names a side with them; or nothing, where that cannot be."""
    sides = sides_of(tuple(flip.words.items()))
    texts = [turn.text for turn in sample.turns]
    if not media.images and not media.videos:
        return sample, media
    if any(map(sides.named, texts)):
        if flip.sided == "leave" or not all(map(sides.swappable, texts)):
            return sample, media
        turns = tuple(replace(turn, text=sides.swapped(turn.text)) for turn in sample.turns)
        sample = replace(sample, turns=turns)
    boxes: tuple[Box, ...] = tuple(mirrored(box, size=media.images[box.picture].size) for box in sample.boxes)
    images = tuple(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in media.images)
    videos = tuple(replace(video, frames=np.ascontiguousarray(video.frames[:, :, ::-1])) for video in media.videos)
    return replace(sample, boxes=boxes), replace(media, images=images, videos=videos)


def _coloured(media: Media, colour: ColourConfig, draws: np.random.Generator) -> Media:
    images = tuple(_colour_change(colour, draws)(image) for image in media.images)
    videos = []
    for video in media.videos:
        change = _colour_change(colour, draws)
        frames = np.stack([np.asarray(change(Image.fromarray(frame))) for frame in video.frames])
        videos.append(replace(video, frames=frames))
    return replace(media, images=images, videos=tuple(videos))


def _colour_change(colour: ColourConfig, draws: np.random.Generator) -> Callable[[Image.Image], Image.Image]:
    """A change of colours, drawn once, so that all frames of a film get the same."""
    by = (colour.brightness, colour.contrast, colour.saturation)
    factors = [draws.uniform(1 - strength, 1 + strength) for strength in by]
    turn = draws.uniform(-colour.hue, colour.hue)

    def change(image: Image.Image) -> Image.Image:
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhancer, factor in zip(enhancers, factors, strict=True):
            image = enhancer(image).enhance(factor) if factor != 1 else image
        return _turned(image, turn) if turn else image

    return change


def _turned(image: Image.Image, turn: float) -> Image.Image:
    """The picture with its hues moved along the colour circle; a turn of 1 is the whole of it."""
    hue, saturation, value = image.convert("HSV").split()
    moved = (np.asarray(hue).astype(np.int64) + round(turn * 256)) % 256
    return Image.merge("HSV", (Image.fromarray(moved.astype(np.uint8)), saturation, value)).convert("RGB")
