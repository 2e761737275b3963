"""Probability paths: golden values and consistency."""

from __future__ import annotations

import pytest
import torch
from golden_case import Case, load_case
from torch import Tensor
from torch.testing import assert_close
from toy import toy_model

from rae_xla.transport.paths import PATHS, Path, expand_like


@pytest.fixture(scope="module")
def plans() -> Case:
    return load_case("transport/plans")


def quantities(path: Path, t: Tensor, data: Tensor, noise: Tensor) -> dict[str, Tensor]:
    tx = expand_like(t, data)
    x_t = path.interpolate(data, noise, tx)
    output = toy_model(x_t, t, torch.zeros_like(t))
    return {
        "alpha": path.alpha(t),
        "sigma": path.sigma(t),
        "d_alpha": path.d_alpha(t),
        "d_sigma": path.d_sigma(t),
        "xt": x_t,
        "ut": path.velocity(data, noise, tx),
        "drift_mean": path.drift_scale(tx) * x_t,
        "drift_var": path.drift_variance(tx),
        "score_from_velocity": path.score_from_velocity(output, x_t, tx),
        "noise_from_velocity": path.noise_from_velocity(output, x_t, tx),
        "velocity_from_score": path.velocity_from_score(output, x_t, tx),
    }


@pytest.mark.parametrize("name", PATHS)
def test_path_quantities_match_golden_values(plans: Case, name: str) -> None:
    actual = quantities(PATHS[name], plans["in.t"], plans["in.x1_data"], plans["in.x0_noise"])
    for quantity, value in actual.items():
        expected = plans[f"out.{name}.{quantity}"]
        finite = plans.tensors.get(f"mask_finite.{name}.{quantity}", torch.ones_like(expected) > 0)
        assert finite.any()
        assert_close(
            value[finite],
            expected[finite],
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, q=quantity: f"{name} {q}: {m}",
        )


@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_derivative_of_path(name: str) -> None:
    path = PATHS[name]
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    step = 1e-6
    for value, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        assert_close(
            (value(t + step) - value(t - step)) / (2 * step), slope(t), rtol=1e-6, atol=1e-8
        )


def test_score_velocity_and_noise_are_consistent() -> None:
    torch.manual_seed(0)
    x, score = torch.randn(2, 5, 3, dtype=torch.float64)
    t = expand_like(torch.linspace(0.2, 0.8, 5, dtype=torch.float64), x)
    for name in ("Linear", "GVP"):
        path = PATHS[name]
        velocity = path.velocity_from_score(score, x, t)
        assert_close(path.score_from_velocity(velocity, x, t), score)
        assert_close(path.score_from_noise(path.noise_from_velocity(velocity, x, t), t), score)
