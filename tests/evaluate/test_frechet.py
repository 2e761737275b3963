"""Fréchet distances with known values, and moments that do not depend on batching."""

import numpy as np
import pytest
import torch
from golden_case import load_case

from rae_xla.errors import UserError
from rae_xla.evaluate.frechet import (
    BLOCK,
    FeatureMoments,
    Gaussian,
    MomentStream,
    frechet_distance,
)


def gaussian(mean, covariance):
    as_tensor = [torch.as_tensor(np.asarray(v), dtype=torch.float64) for v in (mean, covariance)]
    return Gaussian(*as_tensor)


def of_rows(rows):
    return FeatureMoments.of(rows).gaussian("rows")


def random_covariance(seed, size=12, rank=40):
    rows = torch.randn(rank, size, dtype=torch.float64, generator=seeded(seed))
    return rows.T @ rows / rank


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def golden():
    return load_case("eval/metrics")


def test_golden_distances(golden):
    given = golden.meta["fid_mu_sigma"]
    first = gaussian(given["mu1"], given["sigma1"])
    second = gaussian(given["mu2"], given["sigma2"])
    expected = pytest.approx(golden.meta["fid_from_feats"], abs=1e-9)
    assert frechet_distance(first, second) == expected
    assert frechet_distance(second, first) == expected
    assert frechet_distance(first, first) == pytest.approx(golden.meta["fid_identical"], abs=1e-12)


def test_golden_moments(golden):
    given = golden.meta["fid_mu_sigma"]
    for number in ("1", "2"):
        computed = of_rows(golden[f"in.feat{number}"])
        expected = gaussian(given["mu" + number], given["sigma" + number])
        torch.testing.assert_close(computed.mean, expected.mean, rtol=0, atol=1e-7)
        torch.testing.assert_close(computed.covariance, expected.covariance, rtol=0, atol=1e-6)


def test_distance_equals_that_of_the_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    for seed in range(3):
        first, second = random_covariance(seed), random_covariance(seed + 10)
        means = torch.randn(2, 12, dtype=torch.float64, generator=seeded(seed))
        root = linalg.sqrtm((first @ second).numpy()).real
        expected = ((means[0] - means[1]) ** 2).sum() + (first + second).trace()
        expected = expected.item() - 2 * np.trace(root)
        distance = frechet_distance(gaussian(means[0], first), gaussian(means[1], second))
        assert distance == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shared", [0, 5, 20])
def test_singular_covariances_with_a_common_eigenbasis(shared):
    """The distance is the sum of (sqrt(a) - sqrt(b))^2 over the eigenvalues."""
    size = 64
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=seeded(0)))
    first, second = torch.zeros(2, size, dtype=torch.float64)
    first[:20] = torch.logspace(0, 4, 20, dtype=torch.float64)
    second[20 - shared : 40 - shared] = torch.logspace(3, -2, 20, dtype=torch.float64)
    mean = torch.zeros(size)
    one, other = (gaussian(mean, (basis * values) @ basis.T) for values in (first, second))
    expected = ((first.sqrt() - second.sqrt()) ** 2).sum().item()
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-10)


def test_fewer_samples_than_features():
    """With singular covariances, the distance is finite, symmetric, and 0 for equal samples."""
    rows = [torch.randn(20, 300, dtype=torch.float64, generator=seeded(s)) + s for s in (0, 1)]
    first, second = map(of_rows, rows)
    distance, reversed_distance = frechet_distance(first, second), frechet_distance(second, first)
    assert np.isfinite(distance)
    assert distance == pytest.approx(reversed_distance, rel=1e-10)
    assert distance > 300  # that of the means alone
    assert frechet_distance(first, first) < 1e-10
    shuffled = of_rows(rows[0].flip(0))
    assert frechet_distance(first, shuffled) < 1e-8


def test_constant_features():
    constant = of_rows(torch.ones(5, 7))
    assert frechet_distance(constant, constant) == 0
    shifted = Gaussian(constant.mean + 1, constant.covariance)
    assert frechet_distance(constant, shifted) == pytest.approx(7)


def test_moments_far_from_zero_do_not_cancel():
    rows = torch.randn(1000, 4, dtype=torch.float64, generator=seeded(0)) * 1e-3 + 1e4
    merged = None
    for part in rows.split([1, 499, 7, 493]):
        own = FeatureMoments.of(part)
        merged = own if merged is None else merged.merge(own)
    computed = merged.gaussian("rows")
    torch.testing.assert_close(computed.covariance, rows.T.cov(), rtol=1e-8, atol=1e-15)
    torch.testing.assert_close(computed.mean, rows.mean(0), rtol=1e-14, atol=0)


def test_streamed_moments_are_bit_identical_for_any_parts():
    count = 2 * BLOCK + 37
    rows = torch.randn(count, 6, generator=seeded(0))
    results = []
    for size in (1, 7, 64, BLOCK, 3 * BLOCK):
        stream = MomentStream()
        for part in rows.split(size):
            stream.add(part)
        results.append(stream.moments())
    assert {moments.count for moments in results} == {count}
    assert all(torch.equal(moments.scatter, results[0].scatter) for moments in results)
    torch.testing.assert_close(results[0].gaussian("rows").covariance, rows.double().T.cov())


def test_too_few_samples_and_features_that_are_not_finite():
    with pytest.raises(UserError, match="these: 1 image"):
        FeatureMoments.of(torch.zeros(1, 3)).gaussian("these")
    with pytest.raises(UserError, match="not finite"):
        FeatureMoments.of(torch.tensor([[1.0], [float("nan")]])).gaussian("these")


def test_genuine_small_eigenvalues_are_kept():
    """With a spectrum over seven decades, the distance of equal sets stays below 1e-4.

    The error comes from the smallest eigenvalues, whose squares are close to rounding.
    """
    basis, _ = torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64, generator=seeded(0)))
    values = torch.logspace(1.3, -6, 256, dtype=torch.float64)
    one = gaussian(torch.zeros(256), (basis * values) @ basis.T)
    assert frechet_distance(one, one) < 1e-4
    scaled = Gaussian(one.mean, one.covariance * 4)
    assert frechet_distance(one, scaled) == pytest.approx(values.sum().item(), abs=1e-4)
