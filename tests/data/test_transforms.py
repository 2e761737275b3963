"""Transforms: golden crops, colour modes, and the error of the fast crops."""

import numpy as np
import pytest
from golden_case import load_case
from PIL import Image

from rae_xla.data.transforms import (
    center_crop,
    fast_center_crop,
    fast_resize_random_crop,
    flip,
    resize_random_crop,
    resize_short_side,
    to_rgb,
)


def _image(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_center_crop_matches_the_reference():
    case = load_case("train/center_crop")
    for row in case.meta["rows"]:
        image = Image.fromarray(case[f"in.img{row['i']}"].numpy())
        expected = case[f"out.crop{row['i']}"].numpy()
        np.testing.assert_array_equal(center_crop(image, row["size"]), expected)


@pytest.mark.parametrize("size", [(50, 70), (131, 65), (64, 200)])
def test_center_crop_is_the_same_after_resizing_for_shards(size):
    image = _image(*size)
    np.testing.assert_array_equal(
        center_crop(resize_short_side(image, 32), 32), center_crop(image, 32)
    )


def test_random_crop_reaches_every_corner_of_the_resized_image():
    image = _image(100, 200)  # resized to 24 x 48 before a crop of 16
    resized = np.asarray(image.resize((48, 24), Image.Resampling.BICUBIC))
    last = 1 - 2**-53
    np.testing.assert_array_equal(resize_random_crop(image, 16, (0, 0)), resized[:16, :16])
    np.testing.assert_array_equal(resize_random_crop(image, 16, (last, last)), resized[8:, 32:])
    np.testing.assert_array_equal(resize_random_crop(image, 16, (0.5, 0)), resized[:16, 16:32])


def test_random_crop_at_256_resizes_to_384_as_published():
    image = _image(500, 375)
    resized = image.resize((384, 512), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(
        resize_random_crop(image, 256, (0, 0)), np.asarray(resized)[:256, :256]
    )


def test_flip_is_horizontal():
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert flip(pixels)[0, 0].tolist() == pixels[0, 1].tolist()
    assert flip(pixels)[1].tolist() == pixels[1][::-1].tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    grey = Image.new("L", (8, 8), 255)
    rgb = np.asarray(to_rgb(grey.convert(mode) if mode != "LA" else grey.convert("LA")))
    assert rgb.shape == (8, 8, 3)
    assert rgb.min() >= 254  # white stays white (YCbCr rounds)


def test_pixels_of_unknown_range_are_an_error():
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.fromarray(np.full((4, 4), 0.5, np.float32)))
    with pytest.raises(ValueError, match="more than 16 bits"):
        to_rgb(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)))


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = Image.fromarray(np.array([[0, 256, 0x7FFF, 0xFFFF]], np.uint16))
    assert np.asarray(to_rgb(ramp))[0, :, 0].tolist() == [0, 1, 127, 255]


@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 333), (64, 65), (90, 91), (700, 1100), (40, 47), (47, 160)]
)
def test_fast_crops_differ_from_exact_ones_by_one_level(shape):
    smooth = _image(*(side // 8 + 1 for side in shape)).resize(shape[::-1])
    for image in (_image(*shape), smooth):
        for size in (32, 64):
            for fast, exact in (
                (fast_center_crop(image, size), center_crop(image, size)),
                *(
                    (
                        fast_resize_random_crop(image, size, u),
                        resize_random_crop(image, size, u),
                    )
                    for u in ((0, 0), (0.3, 0.8), (1 - 2**-53, 1 - 2**-53))
                ),
            ):
                assert fast.shape == exact.shape == (size, size, 3)
                difference = np.abs(fast.astype(int) - exact)
                assert difference.max() <= 1
                assert difference.mean() < 0.02


def test_fast_crops_without_resizing_are_exact():
    image = _image(32, 50)
    np.testing.assert_array_equal(fast_center_crop(image, 32), center_crop(image, 32))
    image = _image(48, 50)
    u = (0.4, 0.6)
    np.testing.assert_array_equal(
        fast_resize_random_crop(image, 32, u), resize_random_crop(image, 32, u)
    )
