"""Pictures from files: found inside the media root only, measured before they are decoded, always RGB.

A picture is opened by the plugins of `FORMATS`, never by one that starts another program (EPS), and through
the plugin itself, not `PIL.Image.open`, whose own size check warns through the process-wide warning filters.
"""

import re
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

MAX_IMAGE_PIXELS = 64_000_000
"""Pixels (width x height) of the largest picture that is decoded: 192 MB of RGB."""

MAX_IMAGE_SIDE = 20_000
"""Pixels of the longest side of a picture that is decoded."""

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
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|data:")


def is_url(text: str) -> bool:
    """Whether a picture's name is a URL, which is never fetched, not a path."""
    return _URL.match(text) is not None


def resolve_picture(name: str | Path, *, root: Path) -> Path:
    """Where a data file's picture lies, links followed; always a regular file inside `root`.

    Raises:
        DataError: a URL, a path that leaves `root` (absolute, by `..` or by a link), or no such file.
    """
    text = str(name)
    if is_url(text):
        raise DataError(f"picture {text!r} is a URL, and URLs are off: download it and write its path")
    try:
        base = root.resolve()
        path = (base / text).resolve()
        inside = path.is_relative_to(base)
        regular = inside and path.is_file()
    except (ValueError, OSError, RuntimeError) as error:
        raise DataError(f"picture {text!r} is no usable path: {error}") from error
    if not inside:
        raise DataError(
            f"picture {text!r} lies outside the media root {base} (at {path}); move it inside, or set media_root"
        )
    if not regular:
        found = "is no regular file" if path.exists() else "does not exist"
        raise DataError(f"picture {text!r} {found} (tried {path}); correct the path, or set media_root")
    return path


def check_image(name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of a picture, from its header alone; as stored, before EXIF orientation.

    Raises:
        DataError: as `resolve_picture`; or the file is empty, no picture, or larger than the limits.
    """
    path = resolve_picture(name, root=root)
    try:
        with path.open("rb") as file:
            return _open(file, str(name), max_image_pixels).size
    except OSError as error:
        raise DataError(f"picture {str(name)!r} cannot be read: {error}") from error


def load_image(name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """A picture, decoded: RGB, upright (EXIF), transparency over white, 16 bits scaled to 8, first frame.

    Raises:
        DataError: as `check_image`; or the file is truncated or corrupt, or has floating-point pixels, whose
            range nobody can know.
    """
    path = resolve_picture(name, root=root)
    try:
        with path.open("rb") as file:
            image = _open(file, str(name), max_image_pixels)
            image.load()
            if image.mode == "F":
                raise DataError(f"picture {str(name)!r} has floating-point pixels; save it with 8 or 16 bits a channel")
            return to_rgb(ImageOps.exif_transpose(image))
    except (DataError, MemoryError):
        raise
    # A corrupt file makes PIL's plugins raise anything from OSError to zlib.error; each means the same here.
    except Exception as error:
        raise DataError(f"picture {str(name)!r} is corrupt or truncated: {_said(error)}") from error


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


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
