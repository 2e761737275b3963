"""PSNR and SSIM equal those of the reference code."""

import numpy as np
import pytest
from golden_case import load_case

from rae_xla.evaluate.image_metrics import psnr, ssim


@pytest.fixture(scope="module")
def golden():
    return load_case("eval/metrics")


@pytest.fixture(scope="module")
def pair(golden):
    """Originals and reconstructions, (B, 3, H, W) uint8."""
    return tuple(
        np.ascontiguousarray(golden[name].numpy().transpose(0, 3, 1, 2))
        for name in ("in.ref", "in.rec")
    )


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_golden_values(golden, pair, metric):
    name = metric.__name__
    values = metric(*pair)
    expected = [image[name] for image in golden.meta["per_image"]]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert values.mean() == pytest.approx(golden.meta[name], rel=1e-6)
    assert values.dtype == np.float64


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_values_do_not_depend_on_the_batch(pair, metric):
    batched = metric(*pair)
    alone = np.concatenate([metric(a[None], b[None]) for a, b in zip(*pair, strict=True)])
    assert np.array_equal(batched, alone)


def test_psnr_of_known_errors():
    black = np.zeros((3, 3, 8, 8), np.uint8)
    other = black.copy()
    other[1] = 255
    other[2, 0, 0, 0] = 1
    expected = [100, 0, 10 * np.log10(255**2 * 3 * 64)]
    np.testing.assert_allclose(psnr(black, other), expected, rtol=1e-14)
