"""Pictures and films changed for augmentation: a part of them, mirrored, in other colours. PIL and numpy alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageEnhance

from mmpeft.config.augment import ColourConfig, CropConfig
from mmpeft.data.media import MAX_ASPECT
from mmpeft.data.types import Media, Video

Size = tuple[int, int]
Window = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


def crop_window(
    size: Size, crop: CropConfig, draws: np.random.Generator, *, keep: Sequence[tuple[float, ...]] = ()
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
        inside = [value for values in keep for value in values[axis::2]]
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


def cropped_images(images: Sequence[Image.Image], windows: Sequence[Window]) -> tuple[Image.Image, ...]:
    """Each picture's part inside its window."""
    return tuple(image.crop(window) for image, window in zip(images, windows, strict=True))


def cropped_film(video: Video, crop: CropConfig, draws: np.random.Generator) -> Video:
    """A film cut to one window in all its frames."""
    height, width = video.frames.shape[1:3]
    left, top, right, bottom = crop_window((width, height), crop, draws)
    return replace(video, frames=np.ascontiguousarray(video.frames[:, top:bottom, left:right]))


def mirrored_media(media: Media) -> Media:
    """All pictures and films mirrored left to right."""
    images = tuple(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in media.images)
    videos = tuple(replace(video, frames=np.ascontiguousarray(video.frames[:, :, ::-1])) for video in media.videos)
    return replace(media, images=images, videos=videos)


def coloured_media(media: Media, colour: ColourConfig, draws: np.random.Generator) -> Media:
    """Every picture and film in other colours, a film in the same ones from its first frame to its last."""
    images = tuple(_colour_change(colour, draws)(image) for image in media.images)
    videos = []
    for video in media.videos:
        change = _colour_change(colour, draws)
        frames = np.stack([np.asarray(change(Image.fromarray(frame))) for frame in video.frames])
        videos.append(replace(video, frames=frames))
    return replace(media, images=images, videos=tuple(videos))


def _colour_change(colour: ColourConfig, draws: np.random.Generator) -> Callable[[Image.Image], Image.Image]:
    """A change of colours, drawn once."""
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
