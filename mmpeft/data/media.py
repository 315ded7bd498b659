"""Pictures from files: found inside the media root only, measured before they are decoded, always RGB.

A picture is opened by the plugins of `FORMATS`, never by one that starts another program (EPS), and through
the plugin itself, not `PIL.Image.open`, whose own size check warns through the process-wide warning filters.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
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
from mmpeft.data.sniff import HEAD_BYTES, hint

MAX_IMAGE_PIXELS = 64_000_000
"""Pixels (width x height) of the largest picture that is decoded: 192 MB of RGB."""

MAX_IMAGE_SIDE = 20_000
"""Pixels of the longest side of a picture that is decoded."""

MAX_ASPECT = 200
"""Longest side over shortest of a picture that is decoded: the most that Qwen2-VL's `smart_resize` takes."""

LEAST_HALF_PIXELS, MOST_HALVED_PIXELS = 16_000_000, 256_000_000
"""A JPEG beyond the limit is read at half its size if it has so many pixels then, and at most so many before: a
progressive one takes 3 to 6 bytes a pixel before it can be halved."""

OPAQUE = 255
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""

_ON_ITS_SIDE = (5, 6, 7, 8)
"""EXIF orientations by which width and height change places."""

T = TypeVar("T")

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


def resolve_picture(name: str | Path, *, root: Path) -> MediaFile:
    """Where a data file's picture lies; as `mmpeft.data.roots.resolve_inside`."""
    return resolve_inside(name, root=root, kind="picture")


def check_image(name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels of a picture as `load_image` gives it, from its header alone.

    Raises:
        DataError: as `resolve_picture`; or the file is empty, no picture, or larger than the limits.
    """
    return upright_sizes(name, root=root, max_image_pixels=max_image_pixels)[1]


def upright_sizes(
    name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of a picture as its file has it, in which boxes are measured, and as `load_image` gives it.

    Both from the header alone, turned upright by EXIF.

    Raises:
        DataError: as `check_image`.
    """
    path = resolve_picture(name, root=root)
    try:
        with path.open("rb") as file:
            image, stored = _open(file, shown(name), max_image_pixels)
            # A PNG that does not say it before its pixels would be decoded for it.
            told = image.format != "PNG" or "exif" in image.info
            turned = told and _orientation(image) in _ON_ITS_SIDE
    except OSError as error:
        raise DataError(f"picture {shown(name)!r} cannot be read: {error.strerror or error}") from error
    return (stored[::-1], image.size[::-1]) if turned else (stored, image.size)


def _orientation(image: ImageFile) -> int:
    """How a picture is to be turned, by EXIF's numbers; 1, not at all, where EXIF says nothing or is broken."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # PIL turns TIFF itself, and gives its size as it is then
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # Broken metadata, which make PIL raise anything from SyntaxError to struct.error, are no broken picture.
    except Exception:
        return 1


class Note(NamedTuple):
    """What loading a picture leaves out: a word or two by which notes are counted, and a sentence."""

    kind: str
    text: str


def load_image(name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """A picture, decoded: RGB, upright (EXIF), transparency over white, 16 bits scaled to 8, first frame.

    A JPEG of more than `max_image_pixels` is decoded at half its width and height (see `_halve`).

    Raises:
        DataError: as `check_image`; or the file is truncated or corrupt, or has floating-point pixels, whose
            range nobody can know.
    """
    return _load(name, root, max_image_pixels, lambda image, stored, upright: upright)


def load_with_notes(
    name: str | Path, *, root: Path, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[Image.Image, tuple[Note, ...]]:
    """As `load_image`, with what was left out: later frames, transparency, bits, inks, every other row of pixels."""
    return _load(
        name,
        root,
        max_image_pixels,
        lambda image, stored, upright: (upright, tuple(_notes(image, stored, shown(name)))),
    )


def _load(
    name: str | Path, root: Path, max_image_pixels: int, result: Callable[[ImageFile, tuple[int, int], Image.Image], T]
) -> T:
    """`result` of the open file, its size as stored, and the decoded picture."""
    path = resolve_picture(name, root=root)
    try:
        with path.open("rb") as file:
            image, stored = _open(file, shown(name), max_image_pixels)
            image.load()
            if image.mode == "F":
                raise DataError(
                    f"picture {shown(name)!r} has floating-point pixels; save it with 8 or 16 bits a channel"
                )
            return result(image, stored, to_rgb(_upright(image)))
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"picture {shown(name)!r} needs more memory than there is; scale it down") from error
    # A corrupt file makes PIL's plugins raise anything from OSError to zlib.error; each means the same here.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"picture {shown(name)!r} cannot be read: {error.strerror}") from error
        raise DataError(f"picture {shown(name)!r} is corrupt or truncated: {_said(error)}") from error


def _notes(image: ImageFile, stored: tuple[int, int], name: str) -> Iterator[Note]:
    if image.size != stored:
        width, height = image.size
        yield Note("large picture", f"picture {name!r} is {stored[0]} x {stored[1]}; it is read as {width} x {height}")
    if image.mode.startswith("I"):
        yield Note("16 bits", f"picture {name!r} has 16 bits a channel; they are scaled to 8")
    if image.mode == "CMYK":
        yield Note("CMYK", f"picture {name!r} is in CMYK; its colours are converted without a profile")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (OPAQUE, OPAQUE):
        yield Note("transparency", f"picture {name!r} is transparent in places; white lies behind it")
    try:
        frames = getattr(image, "n_frames", 1)
    # Counting walks through the file; what is broken behind the first frame is not used.
    except Exception:
        yield Note("animation", f"picture {name!r} has frames that cannot be read; the first is used")
        return
    if frames > 1:
        yield Note("animation", f"picture {name!r} has {frames} frames; the first is used")


def _upright(image: ImageFile) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    return image.copy() if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL picture of integer pixels as RGB (itself if it is): transparency over white, 16-bit grey scaled to 8."""
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """[height, width] of 16-bit grey (also where PIL keeps it in 32 bits) as uint8."""
    return (np.clip(values.astype(np.int64), 0, 65535) // 257).astype(np.uint8)


def _open(file: BinaryIO, name: str, max_image_pixels: int) -> tuple[ImageFile, tuple[int, int]]:
    """The picture with its header read and its size within the limits, and its size as stored; nothing is decoded."""
    prefix = file.read(HEAD_BYTES)
    if not prefix:
        raise DataError(f"picture {name!r} is an empty file (0 bytes); replace it, or remove its sample")
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
        stored = image.size
        _halve(image, max_image_pixels)
        _check_size(image, name, max_image_pixels)
        return image, stored
    found = hint(prefix) or f" (it begins with {prefix[:8]!r})"
    raise DataError(f"picture {name!r} is not a picture{found}; expected {', '.join(FORMATS)}")


def _halve(image: ImageFile, max_image_pixels: int) -> None:
    """Have a JPEG beyond the limit decoded at half its width and height, if that is within it and still large.

    Each block of 8 x 8 becomes one of 4 x 4 by its lower frequencies, which costs a quarter of the memory. What
    remains is larger than any processor takes; after scaling to 1 megapixel, colours differ by less than one step
    of 256 on average from those of the whole picture (tests/data/test_media.py).
    """
    width, height = image.size
    pixels = width * height
    if isinstance(image, JpegImagePlugin.JpegImageFile) and max_image_pixels < pixels <= MOST_HALVED_PIXELS:
        size = (width + 1) // 2, (height + 1) // 2
        if LEAST_HALF_PIXELS <= size[0] * size[1] <= max_image_pixels:
            image.draft(None, (width // 2, height // 2))


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
