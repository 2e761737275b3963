"""Encoding of images for shards: unchanged files, resizing, and quality."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from rae_xla.data.image_decoding import ROTATED
from rae_xla.data.shards.encoding import Encoding, ShardSample
from rae_xla.data.shards.sources import folder_source
from rae_xla.data.shards.writer import make_shards
from rae_xla.data.transforms import ResizeRandomCrop, center_crop, resize_random_crop
from rae_xla.errors import UserError


def _file(width: int, height: int, format: str = "PNG", mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(width * height)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format)
    return buffer.getvalue()


def _image(sample: ShardSample) -> Image.Image:
    return Image.open(io.BytesIO(sample.image))


@pytest.mark.parametrize(
    ("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")]
)
def test_small_images_and_originals_are_stored_unchanged(format, extension):
    content = _file(64, 32, format)
    for encoding in (Encoding(), Encoding(32), Encoding(40, "bicubic", 80)):
        assert encoding.of_file(content, 3, "x") == ShardSample(content, extension, 3)


def test_adm_resize_keeps_the_centre_crop():
    content = _file(150, 100)
    sample = Encoding(32).of_file(content, 0, "x")
    assert (sample.extension, _image(sample).size) == ("png", (48, 32))
    expected = center_crop(Image.open(io.BytesIO(content)), 32)
    np.testing.assert_array_equal(center_crop(_image(sample), 32), expected)


def test_bicubic_resize_keeps_the_crops_of_stage_1():
    """When resized to 1.5 times the size of the crops, see docs/data.md."""
    content = _file(151, 100)
    sample = Encoding(48, "bicubic").of_file(content, 0, "x")
    assert _image(sample).size == (72, 48)
    for u in [(0.0, 0.0), (0.3, 0.7), (0.99, 0.5)]:
        expected = resize_random_crop(Image.open(io.BytesIO(content)), 32, u)
        np.testing.assert_array_equal(resize_random_crop(_image(sample), 32, u), expected)
        np.testing.assert_array_equal(ResizeRandomCrop(32)(_image(sample), u), expected)


def test_the_two_resizes_differ():
    content = _file(150, 100)
    adm, bicubic = (Encoding(20, how).of_file(content, 0, "x") for how in ("adm", "bicubic"))
    assert adm.image != bicubic.image


def test_quality_encodes_jpegs():
    content = _file(100, 80)
    low, high = (Encoding(32, quality=q).of_file(content, 0, "x") for q in (50, 95))
    assert low.extension == high.extension == "jpg"
    assert _image(high).format == "JPEG"
    assert len(low.image) < len(high.image) < len(Encoding(32).of_file(content, 0, "x").image)
    bmp = Encoding(quality=90).of_file(_file(20, 20, "BMP"), 0, "x")
    assert (bmp.extension, _image(bmp).format) == ("jpg", "JPEG")
    assert Encoding().of_file(_file(20, 20, "BMP"), 0, "x").extension == "png"


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1"])
def test_every_mode_can_be_resized(mode):
    format = "JPEG" if mode == "CMYK" else "PNG"
    for quality in (None, 90):
        sample = Encoding(16, quality=quality).of_file(_file(40, 30, format, mode), 0, "x")
        assert _image(sample).mode == "RGB"
        assert min(_image(sample).size) == 16


def test_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(_image(Encoding().of_pixels(pixels, 0))), pixels)
    assert _image(Encoding(10).of_pixels(pixels, 0)).size == (15, 10)


def test_bad_images_and_bad_options():
    for content in (b"", b"garbage", _file(30, 30)[:200], _file(30, 30, "JPEG")[:400]):
        with pytest.raises(UserError, match=r"here\.png: not a readable image"):
            Encoding().of_file(content, 0, "here.png")
    for wrong, message in [
        ({"image_size": 0}, "--image-size is 0"),
        ({"resize": "area"}, "--resize is 'area'"),
        ({"quality": 0}, "--quality is 0"),
        ({"quality": 101}, "--quality is 101"),
    ]:
        with pytest.raises(UserError, match=message):
            Encoding(**wrong)


def test_images_of_phones(tmp_path, caplog):
    """A JPEG with a second image is kept; AVIF is encoded again; rotations are reported."""
    for name, format in (("a", "MPO"), ("b", "AVIF"), ("c", "JPEG"), ("d", "PNG")):
        (tmp_path / "f" / name).mkdir(parents=True)
        image, exif = Image.open(io.BytesIO(_file(40, 30))), Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image.save(tmp_path / "f" / name / f"{name}.{format.lower()}", format, exif=exif)
    for name, extension in (("a", "mpo"), ("d", "png")):
        path = tmp_path / "f" / name / f"{name}.{extension}"
        path.rename(path.with_suffix(".jpg" if extension == "mpo" else ".png"))
    stored = {}
    for upright in (False, True):
        source = folder_source(
            str(tmp_path / "f"), encoding=Encoding(upright=upright), shuffle=False
        )
        samples = list(source)
        stored[upright] = [(sample.extension, _image(sample).size) for sample in samples]
        names = [s.notes.first[ROTATED] if s.notes else "" for s in samples]
        rotated = [name.rpartition("/")[2] for name in names]
        assert rotated == (["", "", "", ""] if upright else ["a.jpg", "", "c.jpeg", "d.png"])
        index = make_shards(source, str(tmp_path / f"out-{upright}"))
        assert len(index) == 4
        message = "images 3 with an EXIF rotation, which is ignored ("
        assert (message in caplog.text) is not upright
        caplog.clear()
    assert stored[False] == [
        ("jpg", (40, 30)),
        ("png", (30, 40)),
        ("jpg", (40, 30)),
        ("png", (40, 30)),
    ]
    assert stored[True] == [("png", (30, 40))] * 4


def test_an_image_that_training_could_not_use_is_not_stored():
    """It would be kept as it is, and fail when it is read."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(buffer, "PNG")
    with pytest.raises(UserError, match=r"x\.png: not a readable image \(it has 16 bits per pixel"):
        Encoding().of_file(buffer.getvalue(), 0, "x.png")
