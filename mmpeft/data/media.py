"""Pictures from files: found inside the media root only, measured before they are decoded, always RGB.

A picture is opened by the plugins of `FORMATS`, never by one that starts another program (EPS), and through
the plugin itself, not `PIL.Image.open`, whose own size check warns through the process-wide warning filters.
"""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from PIL.ImageFile import ImageFile

from mmpeft.core.errors import DataError
from mmpeft.data.embedded import shown
from mmpeft.data.roots import MediaFile, resolve_inside
from mmpeft.data.roots import is_url as is_url

MAX_IMAGE_PIXELS = 64_000_000
"""Pixels (width x height) of the largest picture that is decoded: 192 MB of RGB."""

MAX_IMAGE_SIDE = 20_000
"""Pixels of the longest side of a picture that is decoded."""

MAX_ASPECT = 200
"""Longest side over shortest of a picture that is decoded: the most that Qwen2-VL's `smart_resize` takes."""

FORMATS = tuple(
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
        PpmImagePlugin.PpmImageFile,
    )
)
_PREFIX_BYTES = 16


def resolve_picture(name: str | Path, *, root: Path) -> MediaFile:
    """Where a data file's picture lies; as `mmpeft.data.roots.resolve_inside`."""
    return resolve_inside(name, root=root, kind="picture")


def check_image(name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of a picture, from its header alone; as stored, before EXIF orientation.

    Raises:
        DataError: as `resolve_picture`; or the file is empty, no picture, or larger than the limits.
    """
    path = resolve_picture(name, root=root)
    try:
        with path.open("rb") as file:
            return _open(file, shown(name), max_image_pixels).size
    except OSError as error:
        raise DataError(f"picture {shown(name)!r} cannot be read: {error}") from error


def picture_notes(name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[str, ...]:
    """What loading a picture leaves out, in a sentence each: the later frames of an animation.

    Raises:
        DataError: as `check_image`.
    """
    path = resolve_picture(name, root=root)
    try:
        with path.open("rb") as file:
            frames = getattr(_open(file, shown(name), max_image_pixels), "n_frames", 1)
    except DataError:
        raise
    # Counting walks through the file: a corrupt one makes a plugin raise anything.
    except Exception as error:
        raise DataError(f"picture {shown(name)!r} is corrupt or truncated: {_said(error)}") from error
    return (f"picture {shown(name)!r} has {frames} frames; the first is used",) if frames > 1 else ()


def load_image(name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """A picture, decoded: RGB, upright (EXIF), transparency over white, 16 bits scaled to 8, first frame.

    Raises:
        DataError: as `check_image`; or the file is truncated or corrupt, or has floating-point pixels, whose
            range nobody can know.
    """
    path = resolve_picture(name, root=root)
    try:
        with path.open("rb") as file:
            image = _open(file, shown(name), max_image_pixels)
            image.load()
            if image.mode == "F":
                raise DataError(
                    f"picture {shown(name)!r} has floating-point pixels; save it with 8 or 16 bits a channel"
                )
            return to_rgb(ImageOps.exif_transpose(image))
    except (DataError, MemoryError):
        raise
    # A corrupt file makes PIL's plugins raise anything from OSError to zlib.error; each means the same here.
    except Exception as error:
        raise DataError(f"picture {shown(name)!r} is corrupt or truncated: {_said(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL picture of integer pixels as RGB: transparency over white, 16-bit grey scaled to 8 bits."""
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """[height, width] of 16-bit grey (also where PIL keeps it in 32 bits) as uint8."""
    return (np.clip(values.astype(np.int64), 0, 65535) // 257).astype(np.uint8)


def _open(file: BinaryIO, name: str, max_image_pixels: int) -> ImageFile:
    """The picture with its header read and its size within the limits; nothing is decoded."""
    prefix = file.read(_PREFIX_BYTES)
    if not prefix:
        raise DataError(f"picture {name!r} is an empty file (0 bytes)")
    for identifier in FORMATS:
        factory, accept = Image.OPEN[identifier]
        if accept is None or accept(prefix) is not True:
            continue
        file.seek(0)
        try:
            image = factory(file, name)
        # As in `load_image`: a corrupt header makes a plugin raise anything.
        except Exception as error:
            raise DataError(f"picture {name!r} is no readable {identifier}: {_said(error)}") from error
        _check_size(image, name, max_image_pixels)
        return image
    raise DataError(f"picture {name!r} is not a picture (begins with {prefix[:8]!r}); expected {', '.join(FORMATS)}")


def _check_size(image: ImageFile, name: str, max_image_pixels: int) -> None:
    width, height = image.size
    if max(width, height) > MAX_IMAGE_SIDE or width * height > max_image_pixels:
        raise DataError(
            f"picture {name!r} is {width} x {height} pixels; the limits are {MAX_IMAGE_SIDE} a side and "
            f"{max_image_pixels} in all: scale it down"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(
            f"picture {name!r} is {width} x {height} pixels, too thin: its sides may differ by a factor of "
            f"{MAX_ASPECT} at most; cut it, or pad it"
        )


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
