"""Decode images: the formats that are read, and one error for everything that cannot be used.

All readers of images use this module (training, shards, evaluation, reconstruction, reports), so
they take the same files and report the same faults.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from rae_xla.errors import UserError

if TYPE_CHECKING:
    from rae_xla.data.image_finder import ImageNotes

HEIF_PACKAGE = "pillow-heif"
"""The package that lets Pillow read HEIC images; it is not a requirement of this one."""

# Installed codecs, found without importing them: workers that load data must start quickly.
_HAS_AVIF = importlib.util.find_spec("PIL._avif") is not None
_HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None

_EXTENSIONS = {
    "JPEG": ("jfif", "jpe", "jpeg", "jpg"),
    "PNG": ("png",),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "PPM": ("pbm", "pgm", "pnm", "ppm"),
    "TIFF": ("tif", "tiff"),
    "WEBP": ("webp",),
    "AVIF": ("avif",) if _HAS_AVIF else (),
    "JPEG2000": ("j2k", "jp2", "jpx"),
    "HEIF": ("heic", "heif", "hif") if _HAS_HEIF else (),
}
"""Format by the name that Pillow gives it -> extensions. Pillow tries no others: some of its
readers start external programs (PostScript). The first five are those whose readers are fast to
import; the others are imported for a file that is none of these."""

IMAGE_EXTENSIONS = tuple(sorted(ext for extensions in _EXTENSIONS.values() for ext in extensions))
"""Extensions (lower case) of files, and of members of a shard, that are images."""

_RAW = ("3fr", "arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2")
_NOT_READ = ("exr", "hdr", "ico", "jxl", "psd", "svg", "tga")
_OTHER_IMAGES = {
    **dict.fromkeys(("heic", "heif", "hif"), f"`pip install {HEIF_PACKAGE}` to read it"),
    "avif": "install a Pillow with AVIF to read it",
    **dict.fromkeys(_RAW, "a raw file: convert it"),
    **dict.fromkeys(_NOT_READ, "convert it to PNG"),
}
"""Extensions of images that are not read here -> what to do."""

DECODE_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,  # of the decoders of AVIF and HEIC
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for bytes that are not a valid image."""

ROTATED = "with an EXIF rotation, which is ignored"
"""How logs describe images that are read as they are stored."""

MORE_FRAMES = "with more than one frame or page, of which the first is read"
"""How logs describe animations, and files of several images."""

WIDE_LIMIT = 1 << 12
"""If no pixel of a 16-bit image reaches it, the image may have fewer bits in a 16-bit file."""

_WIDE = "rae_xla_16_bits"  # key in Image.info: the file has 16 bits per channel
_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}


class ImageError(ValueError):
    """Bytes are not an image that can be used; the message says why, without the file's name."""


@contextmanager
def open_image(
    content: bytes | memoryview, name: str = "", notes: ImageNotes | None = None
) -> Iterator[Image.Image]:
    """Open an encoded image, whose pixels are decoded when they are first used.

    AVIF and HEIC images are upright, as their standards require. The EXIF rotation of others is
    ignored, as in the published code; see ``upright``.

    Args:
        content: of the image's file.
        name: of the image, for ``notes``.
        notes: gets the image if something of it is not read: an EXIF rotation, or more frames.

    Raises:
        ImageError: the image is invalid or of another format; also if that is found out inside the
            context, when the pixels are decoded.
    """
    heic = _is_heic(content)
    if heic and _HAS_HEIF:
        _register_heif()
    try:
        with Image.open(io.BytesIO(content), formats=_formats(heic)) as image:
            # Of colours, Pillow keeps the upper 8 bits.
            if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
                image.info[_WIDE] = True
            opened = upright(image) if image.format == "AVIF" else image
            if notes is not None:
                _take_notes(content, image, exif_rotation(opened), name, notes)
            yield opened
    except (ImageError, UserError):
        raise
    except DECODE_ERRORS as error:
        raise ImageError(_reason(content, error)) from None


def decode_rgb(
    content: bytes | memoryview, name: str = "", notes: ImageNotes | None = None
) -> Image.Image:
    """Return an encoded image as RGB; see ``open_image`` and ``to_rgb``.

    Raises:
        ImageError: the image cannot be used.
    """
    with open_image(content, name, notes) as image:
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB with 8 bits per channel: repeat grey, convert CMYK, drop transparency.

    Greys of 16 bits are divided by 256. Where the range of the values is unknown, that would give
    a black image, so it is an error.

    Raises:
        ImageError: the pixels are floating-point numbers, negative, or have more than 16 bits; or
            they have 16 bits and use 12 of them at most.
    """
    if image.mode == "F":
        raise ImageError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if (values < 0).any():
            raise ImageError("it has pixels below 0")
        if (values > 0xFFFF).any():
            raise ImageError("its pixels have more than 16 bits")
        _check_range(int(np.max(values)))
        # Pillow would clip 16-bit greys at 255 instead of scaling them.
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.info.get(_WIDE):
        image.load()
        colours = image.convert("RGB")
        _check_range(int(np.max(np.asarray(colours))) << 8, exact=False)
        return colours
    return image.convert("RGB")


def _check_range(largest: int, exact: bool = True) -> None:
    """Raise if pixels of a 16-bit image, up to ``largest``, may have a smaller range.

    Args:
        largest: the largest value.
        exact: whether it is known in full; otherwise its lower 8 bits are unknown.
    """
    if largest >= WIDE_LIMIT or (largest == 0 and exact):
        return
    shown = largest if exact else largest + 255
    raise ImageError(
        f"it has 16 bits per pixel and no value above {shown}, so the range of the values is "
        "unknown: save it with 8 bits per channel"
    )


def exif_rotation(image: Image.Image) -> bool:
    """Return whether an image is stored rotated or mirrored, according to its EXIF data."""
    return image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)


def _take_notes(
    content: bytes | memoryview, image: Image.Image, rotated: bool, name: str, notes: ImageNotes
) -> None:
    if rotated:
        notes.add(ROTATED, name)
    if _has_more_frames(content, image):
        notes.add(MORE_FRAMES, name)


def _has_more_frames(content: bytes | memoryview, image: Image.Image) -> bool:
    if image.format in ("HEIF", "MPO"):
        return False  # a phone adds a thumbnail, or a map of depth or brightness
    if image.format not in ("GIF", "TIFF"):
        return int(getattr(image, "n_frames", 1)) > 1
    # Searching moves the file to another frame, or fails where the first one is intact.
    with suppress(*DECODE_ERRORS), Image.open(io.BytesIO(content), formats=[image.format]) as again:
        return bool(getattr(again, "is_animated", False))
    return False


def is_rotated(content: bytes | memoryview) -> bool:
    """Return whether a JPEG has an EXIF rotation, by its header alone.

    Cameras write JPEGs; the pixels of a PNG would have to be decoded.
    """
    if bytes(content[:2]) != b"\xff\xd8":
        return False
    try:
        with open_image(content) as image:
            return exif_rotation(image)
    except ImageError:
        return False


def upright(image: Image.Image) -> Image.Image:
    """Return the image as its EXIF data rotate it; the image itself if they do not."""
    if not exif_rotation(image):
        return image
    rotated = ImageOps.exif_transpose(image)
    assert rotated is not None, "only None in place"
    rotated.format = image.format
    return rotated


def extension_of(name: str) -> str:
    """Return what follows the last dot of a file's name, in lower case; empty if there is none."""
    stem, _, extension = name.rpartition(".")
    return extension.lower() if stem else ""


def unread_image_hint(extension: str) -> str | None:
    """Return what to do about an image that is not read, by its extension; None for other files."""
    return None if extension in IMAGE_EXTENSIONS else _OTHER_IMAGES.get(extension)


def _formats(heic: bool) -> list[str]:
    """Return the formats that Pillow tries; it must not be asked for one without a reader."""
    if heic and _HAS_HEIF:
        return ["HEIF"]
    return [name for name in _readable() if name != "HEIF"]


def _is_heic(content: bytes | memoryview) -> bool:
    """Return whether the content is an ISO media file with a HEIC brand, and is not AVIF."""
    head = bytes(content[:64])
    if head[4:8] != b"ftyp":
        return False
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = {head[start : start + 4] for start in (8, *range(16, length, 4))}
    return bool(brands & _BRANDS) and not brands & {b"avif", b"avis"}


@functools.cache
def _register_heif() -> None:
    """Add HEIC to Pillow's formats, once in each process."""
    plugin: Any = importlib.import_module("pillow_heif")
    plugin.register_heif_opener()


def _reason(content: bytes | memoryview, error: BaseException) -> str:
    """Return what is wrong with the content that Pillow raised ``error`` for."""
    head = bytes(content[:256])
    if not head:
        return "the file is empty"
    if _is_heic(content) and not _HAS_HEIF:
        return f"it is a HEIC image, and reading it needs `pip install {HEIF_PACKAGE}`"
    if head.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the image: run `git lfs pull`"
    if isinstance(error, UnidentifiedImageError):
        if re.match(rb"\s*<(!doctype|html|\?xml|svg)", head, re.IGNORECASE):
            return "it is an HTML, XML or SVG file"
        return f"it is damaged, or not in a format that is read ({', '.join(_readable())})"
    # Pillow's messages may contain the address of an object.
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>", "the file", str(error).strip())
    return text.split("\n")[0] or type(error).__name__


def _readable() -> list[str]:
    return [name for name, extensions in _EXTENSIONS.items() if extensions]
