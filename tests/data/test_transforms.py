import numpy as np
import pytest
from golden_case import load_case
from PIL import Image

from rae_xla.data.transforms import (
    center_crop,
    flip,
    resize_random_crop,
    resize_short_side,
    to_rgb,
)


def _picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_center_crop_gives_the_reference_bytes():
    case = load_case("train/center_crop")
    for row in case.meta["rows"]:
        image = Image.fromarray(case[f"in.img{row['i']}"].numpy())
        expected = case[f"out.crop{row['i']}"].numpy()
        np.testing.assert_array_equal(center_crop(image, row["size"]), expected)


@pytest.mark.parametrize("size", [(50, 70), (131, 65), (64, 200)])
def test_center_crop_of_a_picture_resized_for_the_shards_is_that_of_the_original(size):
    image = _picture(*size)
    np.testing.assert_array_equal(
        center_crop(resize_short_side(image, 32), 32), center_crop(image, 32)
    )


def test_random_crop_reaches_every_corner_of_the_resized_picture():
    image = _picture(100, 200)  # resized to 24 x 48 before a crop of 16
    resized = np.asarray(image.resize((48, 24), Image.Resampling.BICUBIC))
    last = 1 - 2**-53
    np.testing.assert_array_equal(resize_random_crop(image, 16, (0, 0)), resized[:16, :16])
    np.testing.assert_array_equal(resize_random_crop(image, 16, (last, last)), resized[8:, 32:])
    np.testing.assert_array_equal(resize_random_crop(image, 16, (0.5, 0)), resized[:16, 16:32])


def test_random_crop_at_256_resizes_to_384_as_published():
    image = _picture(500, 375)
    whole = image.resize((384, 512), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        resize_random_crop(image, 256, (0, 0)), np.asarray(whole)[:256, :256]
    )


def test_flip_exchanges_left_and_right():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert flip(pixels)[0, 0].tolist() == pixels[0, 1].tolist()
    assert flip(pixels)[1].tolist() == pixels[1][::-1].tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.new("L", (8, 8), 255)
    rgb = np.asarray(to_rgb(grey.convert(mode) if mode != "LA" else grey.convert("LA")))
    assert rgb.shape == (8, 8, 3)
    assert rgb.min() >= 254  # white stays white (YCbCr rounds)


def test_sixteen_bit_greys_are_scaled_not_clipped():
    ramp = Image.fromarray(np.array([[0, 256, 0x7FFF, 0xFFFF]], np.uint16))
    assert np.asarray(to_rgb(ramp))[0, :, 0].tolist() == [0, 1, 127, 255]
