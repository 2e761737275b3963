"""Decoding: formats, bit depths, rotation, and the errors of everything that is not an image."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin, features

from rae_xla.data import image_decoding
from rae_xla.data.image_decoding import (
    IMAGE_EXTENSIONS,
    ImageError,
    decode_rgb,
    exif_rotation,
    extension_of,
    open_image,
    to_rgb,
    unread_image_hint,
    upright,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rotated_exif():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats(format):
    content = encoded(Image.fromarray(PIXELS), format)
    np.testing.assert_array_equal(decode_rgb(content), PIXELS)


@pytest.mark.parametrize("format", ["JPEG", "MPO", "GIF", "WEBP", "AVIF", "JPEG2000"])
def test_other_formats(format):
    assert format != "AVIF" or features.check("avif"), "the pinned Pillow reads AVIF"
    content = encoded(Image.fromarray(PIXELS), format)
    assert decode_rgb(content).size == (20, 12)
    assert decode_rgb(memoryview(content)).mode == "RGB"


def test_extensions():
    assert {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "ppm", "tif"} < {*IMAGE_EXTENSIONS}
    assert (extension_of("a.B.JPG"), extension_of("a"), extension_of(".png")) == ("jpg", "", "")
    assert unread_image_hint("jpg") is None
    assert unread_image_hint("txt") is None
    assert unread_image_hint("dng") == "a raw file: convert it"


def test_sixteen_bits_are_scaled_or_refused():
    """An image that has fewer bits than its file would become black."""
    for high, expected in ((0xFFFF, 255), (0x7FFF, 127), (0x1000, 16), (0, 0)):
        grey = Image.fromarray(np.array([[0, high]], np.uint16))
        assert np.asarray(decode_rgb(encoded(grey, "PNG")))[0, 1, 0] == expected
        assert np.asarray(decode_rgb(encoded(grey, "TIFF")))[0, 1, 0] == expected
    for dtype in (np.uint16, np.int32):
        for high in (1, 200, 255, 256, 4095):
            grey = Image.fromarray(np.array([[0, high]], dtype))
            with pytest.raises(ImageError, match=f"no value above {high}, so the range"):
                to_rgb(grey)
    with pytest.raises(ImageError, match="pixels below 0"):
        to_rgb(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_portable_grey_maps_have_a_range():
    """Their largest value is in their header."""
    content = b"P5 2 1 1023\n" + np.array([0, 1023], ">u2").tobytes()
    assert np.asarray(decode_rgb(content))[0, :, 0].tolist() == [0, 255]


def png_of_16_bits(values):
    """Return a PNG with 16 bits per channel, which Pillow does not write: RGB (H, W, 3)."""
    import struct
    import zlib

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_colours_of_sixteen_bits():
    """Pillow drops their lower 8 bits."""
    wide = PIXELS.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_rgb(png_of_16_bits(wide)), PIXELS)
    with pytest.raises(ImageError, match="no value above 255, so the range"):
        decode_rgb(png_of_16_bits(PIXELS.astype(np.uint16)))


def test_rotation():
    """That of EXIF is ignored, as in the published code; that of AVIF is part of the format."""
    tall = encoded(Image.fromarray(PIXELS), "JPEG", exif=rotated_exif())
    with open_image(tall) as image:
        assert exif_rotation(image)
        assert to_rgb(image).size == (20, 12)
        assert upright(image).size == (12, 20)
        assert upright(image).format == "JPEG"
    with open_image(encoded(Image.fromarray(PIXELS), "AVIF", exif=rotated_exif())) as image:
        assert (image.size, image.format, exif_rotation(image)) == ((12, 20), "AVIF", False)
    with open_image(encoded(Image.fromarray(PIXELS), "PNG")) as image:
        assert not exif_rotation(image)
        assert upright(image) is image


def long_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "x" * (2 << 20), zip=True)
    return encoded(Image.fromarray(PIXELS), "PNG", pnginfo=info)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "^the file is empty$"),
        (b"garbage", r"^it is damaged, or not in a format that is read \(JPEG, PNG, .*AVIF"),
        (b"<!DOCTYPE html><html>", "^it is an HTML, XML or SVG file$"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (encoded(Image.fromarray(PIXELS), "PNG")[:200], "truncated|broken"),
        (encoded(Image.fromarray(PIXELS), "JPEG")[:-60], "truncated"),
        (encoded(Image.fromarray(PIXELS[..., 0] / np.float32(255)), "TIFF"), "floating-point"),
        (b"BM" + bytes(52), "BMP"),
        (b"P6 100000 100000 255\n", "decompression bomb"),
        (long_text(), "MAX_TEXT_CHUNK"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not in a format that is read"),
    ],
)
def test_one_error_for_everything_else(content, message):
    with pytest.raises(ImageError, match=message) as caught:
        decode_rgb(content)
    assert "0x" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_heic_needs_a_package(monkeypatch):
    monkeypatch.setattr(image_decoding, "_HAS_HEIF", False)
    with pytest.raises(ImageError, match=r"it is a HEIC image, .*`pip install pillow-heif`"):
        decode_rgb(HEIC)


HEIF_PLUGIN = """
from PIL import Image

def register_heif_opener():
    Image.register_open("HEIF", open_heif, lambda prefix: prefix[4:12] == b"ftypheic")

def open_heif(file, name):
    image = Image.new("RGB", (3, 2), "red")
    image.format = "HEIF"
    return image
"""


def test_heic_is_read_if_the_package_is_installed(tmp_path):
    """The real package is not a requirement; a plugin of its name has its interface."""
    (tmp_path / "pillow_heif.py").write_text(HEIF_PLUGIN)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from rae_xla.data.image_decoding import IMAGE_EXTENSIONS, decode_rgb, unread_image_hint
assert "heic" in IMAGE_EXTENSIONS and unread_image_hint("heic") is None
assert "pillow_heif" not in sys.modules
print(decode_rgb({HEIC!r}).size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "(3, 2)", done.stderr


def test_damaged_images_raise_one_error():
    """Random damage of every format: an image, or an ``ImageError``."""
    rng = np.random.default_rng(1)
    exif = rotated_exif()
    formats = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "JPEG2000", "MPO")
    contents = [encoded(Image.fromarray(PIXELS), name) for name in formats]
    contents += [encoded(Image.fromarray(PIXELS), n, exif=exif) for n in ("PNG", "JPEG", "AVIF")]
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage
        for number in range(1500):
            damaged = np.frombuffer(contents[number % len(contents)], np.uint8).copy()
            where = rng.integers(0, min(len(damaged), (40, 400, 10**6)[number % 3]), 1 + number % 4)
            damaged[where] = rng.choice([0, 127, 255, rng.integers(256)], len(where))
            try:
                with open_image(damaged.tobytes()[: len(damaged) - number % 7 * 3]) as image:
                    upright(to_rgb(image))
            except ImageError:
                refused += 1
    assert 300 < refused < 1400
