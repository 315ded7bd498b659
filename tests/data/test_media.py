import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from mmpeft.core.errors import DataError
from mmpeft.data.media import (
    MAX_IMAGE_PIXELS,
    check_image,
    load_image,
    load_with_notes,
    upright_sizes,
)
from tests.data.files import picture

WHITE, RED = (255, 255, 255), (255, 0, 0)


def failure(name, root, function=load_image, **options):
    with pytest.raises(DataError) as caught:
        function(name, root=root, **options)
    return str(caught.value)


def notes_of(name, root):
    return tuple(note.text for note in load_with_notes(name, root=root)[1])


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds (almost) no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_picture_inside_the_root_is_opened_by_relative_or_absolute_path(tmp_path):
    path = picture(tmp_path / "字/a.png", size=(5, 3))
    for name in ("字/a.png", "./字/../字/a.png", path):
        assert check_image(name, root=tmp_path) == (5, 3)
        image = load_image(name, root=tmp_path)
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 3), RED)


def test_nothing_outside_the_root_is_opened(tmp_path):
    outside, root = picture(tmp_path / "secret.png"), tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    for name in ("../secret.png", str(outside), "link.png", "folder/secret.png"):
        message = failure(name, root)
        assert f"{name!r} lies outside the media root {root}" in message
        assert "set media_root" in message


def test_a_link_inside_the_root_is_followed(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert load_image("b.png", root=tmp_path).size == (16, 12)


@pytest.mark.parametrize("url", ["http://x/a.png", "https://x/a.png", "ftp://x/a.png"])
def test_urls_are_off(tmp_path, url):
    assert "is a URL, and URLs are off: download it" in failure(url, tmp_path)


def test_a_missing_file_names_the_path_that_was_tried(tmp_path):
    assert failure("no.png", tmp_path) == (
        f"picture 'no.png' does not exist (tried {tmp_path / 'no.png'}); correct the path, or set media_root"
    )
    assert "is no usable path" in failure("a\0b.png", tmp_path)
    assert "is no usable path" in failure("a" * 5000, tmp_path)


def test_folders_and_pipes_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        assert "is no regular file" in failure(name, tmp_path)


def test_an_empty_file_and_one_that_is_no_picture(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"hello, world, how are you?")
    (tmp_path / "post.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "header.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    for function in (check_image, load_image):
        assert "is an empty file (0 bytes)" in failure("empty.png", tmp_path, function)
        assert "is not a picture (it begins with b'hello, w'); expected PNG" in failure("text.png", tmp_path, function)
        assert "is not a picture" in failure("post.eps", tmp_path, function)
        assert "is no readable PNG" in failure("header.png", tmp_path, function)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_truncated_picture_is_an_error_in_every_format(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a", form)
    assert load_image("a", root=tmp_path).size == (64, 64)
    (tmp_path / "b").write_bytes((tmp_path / "a").read_bytes()[:-400])
    message = failure("b", tmp_path)
    assert "picture 'b' is" in message
    assert "corrupt or truncated" in message or "no readable" in message


def test_a_corrupt_png_is_an_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[200:260] = b"\xff" * 60
    (tmp_path / "a.png").write_bytes(data)
    assert check_image("a.png", root=tmp_path) == (64, 64)
    assert "picture 'a.png' is corrupt or truncated" in failure("a.png", tmp_path)


@pytest.mark.parametrize("size", [(50_000, 100), (50_000, 50_000), (10_000, 9_000), (20_001, 1)])
def test_a_bomb_is_refused_by_its_header_without_a_warning(tmp_path, size):
    (tmp_path / "bomb.png").write_bytes(png_header(*size))
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for function in (check_image, load_image):
            message = failure("bomb.png", tmp_path, function)
            assert f"'bomb.png' is {size[0]} x {size[1]} pixels; the limits are 20000 a side" in message
    assert not caught
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_can_be_set(tmp_path):
    picture(tmp_path / "a.png", size=(20, 10))
    assert "20 x 10 pixels" in failure("a.png", tmp_path, max_image_pixels=199)
    assert load_image("a.png", root=tmp_path, max_image_pixels=200).size == (20, 10)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_in_header_and_pixels(tmp_path, form, orientation):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))
    turns = Image.Transpose
    stored_as = [None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM]
    stored_as += [turns.TRANSPOSE, turns.ROTATE_90, turns.TRANSVERSE, turns.ROTATE_270]
    turn = stored_as[orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    (upright if turn is None else upright.transpose(turn)).save(tmp_path / "a", form, exif=exif, quality=95)
    image = load_image("a", root=tmp_path)
    assert image.size == check_image("a", root=tmp_path) == (32, 16)
    assert image.getpixel((4, 3))[1] < 60
    assert min(image.getpixel((28, 3)) + image.getpixel((4, 13)) + image.getpixel((28, 13))) > 200


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_broken_exif_data_are_no_broken_picture(tmp_path, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a", form, exif=exif)
    data = (tmp_path / "a").read_bytes()
    assert data.count(b"MM\0*") == 1
    (tmp_path / "a").write_bytes(data.replace(b"MM\0*", b"XX\0*"))
    assert load_image("a", root=tmp_path).size == check_image("a", root=tmp_path) == (20, 10)


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    grey = Image.new("L", (4, 4), 7)
    grey.save(tmp_path / "l.png", transparency=7)
    for name in ("rgba.png", "la.png", "p.png", "l.png"):
        assert load_image(name, root=tmp_path).getpixel((0, 0)) == WHITE, name
    assert load_image("p.png", root=tmp_path).getpixel((1, 0)) == RED


def test_cmyk_jpegs_as_printers_and_adobe_write_them_become_rgb(tmp_path):
    """Adobe's inks are stored inverted, which its marker says; PIL writes that marker."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    red, green, blue = load_image("a.jpg", root=tmp_path).getpixel((8, 8))
    assert red > 240 > 15 > max(green, blue)
    assert notes_of("a.jpg", tmp_path) == ("picture 'a.jpg' is in CMYK; its colours are converted without a profile",)


def test_sixteen_bit_colour_is_scaled_too(tmp_path):
    """PIL cannot write it: a PNG of one pixel of 16 bits a channel, by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 30000, 300))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    end = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + end)
    assert load_image("a.png", root=tmp_path).getpixel((0, 0)) == (255, 117, 1)


def test_palette_cmyk_and_bilevel_become_rgb(tmp_path):
    Image.new("RGB", (4, 4), "red").quantize(4).save(tmp_path / "p.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "c.tiff")
    Image.new("1", (4, 4), 1).save(tmp_path / "1.png")
    found = {name: load_image(name, root=tmp_path) for name in ("p.png", "c.tiff", "1.png")}
    assert {image.mode for image in found.values()} == {"RGB"}
    assert [image.getpixel((0, 0)) for image in found.values()] == [RED, RED, WHITE]


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, name):
    values = np.array([[0, 300, 30000, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    grey = np.asarray(load_image(name, root=tmp_path))[0, :, 0]
    assert grey.tolist() == [0, 1, 116, 255]


def test_pixels_of_floats_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "f.tiff")
    assert "'f.tiff' has floating-point pixels" in failure("f.tiff", tmp_path)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image("a.gif", root=tmp_path).getpixel((0, 0)) == RED
    assert notes_of("a.gif", tmp_path) == ("picture 'a.gif' has 2 frames; the first is used",)
    picture(tmp_path / "a.png")
    assert notes_of("a.png", tmp_path) == ()


@pytest.mark.parametrize("form", ["WEBP", "PNG", "TIFF"])
def test_animations_and_pages_of_other_formats_give_their_first_frame_and_say_so(tmp_path, form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(tmp_path / "a", form, save_all=True, append_images=frames[1:], **options)
    image, notes = load_with_notes("a", root=tmp_path)
    assert image.getpixel((4, 4)) == RED
    assert [(note.kind, note.text) for note in notes] == [("animation", "picture 'a' has 3 frames; the first is used")]


def test_an_animation_whose_later_frames_are_broken_is_used_and_noted(tmp_path):
    frames = [Image.effect_noise((64, 64), 90).convert("P") for _ in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[: len(data) * 2 // 3])
    image, notes = load_with_notes("a.gif", root=tmp_path)
    assert image.size == (64, 64)
    assert [note.kind for note in notes] == ["animation"]


def test_what_is_lost_of_a_picture_is_noted_and_what_is_not_is_not(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 100)).save(tmp_path / "see-through.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "opaque.png")
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "deep.png")
    picture(tmp_path / "plain.jpg")
    found = {
        name: [note.kind for note in load_with_notes(name, root=tmp_path)[1]]
        for name in ("see-through.png", "opaque.png", "deep.png", "plain.jpg")
    }
    assert found == {"see-through.png": ["transparency"], "opaque.png": [], "deep.png": ["16 bits"], "plain.jpg": []}


def test_a_jpeg_beyond_the_limit_is_halved_and_stays_what_a_processor_would_see(tmp_path):
    detail = Image.effect_noise((410, 400), 60).resize((820, 800), Image.Resampling.BICUBIC)
    tile = np.stack([np.asarray(detail), np.asarray(detail.rotate(90).resize((820, 800))), np.asarray(detail)[::-1]], 2)
    whole = Image.fromarray(np.tile(tile, (10, 10, 1)))
    whole.save(tmp_path / "a.jpg", quality=90)
    assert whole.width * whole.height > MAX_IMAGE_PIXELS
    image, notes = load_with_notes("a.jpg", root=tmp_path)
    assert image.size == check_image("a.jpg", root=tmp_path) == (4100, 4000)
    assert upright_sizes("a.jpg", root=tmp_path) == ((8200, 8000), (4100, 4000))
    assert notes[0].text == "picture 'a.jpg' is 8200 x 8000; it is read as 4100 x 4000"
    seen = np.asarray(image.resize((1025, 1000), Image.Resampling.BICUBIC), dtype=int)
    decoded = Image.open(tmp_path / "a.jpg").resize((1025, 1000), Image.Resampling.BICUBIC)
    assert np.abs(seen - np.asarray(decoded, dtype=int)).mean() < 1


def test_a_jpeg_far_beyond_the_limit_or_a_png_is_refused_as_before(tmp_path):
    picture(tmp_path / "a.jpg", size=(3000, 2000))
    assert "3000 x 2000 pixels; the limits are" in failure("a.jpg", tmp_path, max_image_pixels=1_000_000)
    (tmp_path / "b.png").write_bytes(png_header(9000, 9000))
    assert "9000 x 9000 pixels; the limits are" in failure("b.png", tmp_path)


def test_a_very_thin_picture_is_refused(tmp_path):
    picture(tmp_path / "a.png", size=(1000, 5))
    picture(tmp_path / "b.png", size=(4, 1000))
    assert load_image("a.png", root=tmp_path).size == (1000, 5)
    for function in (check_image, load_image):
        assert "'b.png' is 4 x 1000 pixels, too thin" in failure("b.png", tmp_path, function)


def test_the_picture_does_not_need_its_file_any_more(tmp_path):
    picture(tmp_path / "a.png")
    image = load_image("a.png", root=tmp_path)
    (tmp_path / "a.png").unlink()
    image.save(io.BytesIO(), "PNG")
