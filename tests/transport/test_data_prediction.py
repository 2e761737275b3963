"""Data prediction (RAEv2): losses and velocities of the published code, times, end of sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_case import load_case
from raev2_cases import build
from torch import Tensor
from torch.testing import assert_close

from rae_xla.errors import UserError
from rae_xla.models.pretrained.dit_layouts import to_raev2
from rae_xla.transport import create_transport
from rae_xla.transport.losses import alignment_loss, velocity_from_data
from rae_xla.transport.paths import expand_like


@pytest.mark.parametrize("t_eps", [0.05, 0.02])
def test_velocity_matches_golden_values(t_eps: float) -> None:
    case = load_case("raev2/train/convert_x_to_velocity")
    x, output, t = case["in.xt"], case["in.model_output"], case["in.t"]
    found = velocity_from_data(output, x, expand_like(t, x), t_eps)
    assert_close(found, case[f"out.velocity_eps{t_eps}"])


def recorded_times(run: dict[str, Any], normal: Tensor) -> Tensor:
    """Return the shifted times of recorded normal numbers, untruncated."""
    tr = create_transport(
        prediction=run["prediction"],
        time_dist_type=run["time_dist_type"],
        time_dist_shift=run["shift"],
        truncate_times=False,
    )
    uniform = 0.5 * (1 + torch.erf(normal.double() / 2**0.5))
    return tr.sample_times(uniform).float()


CASES = [("losses", i) for i in range(5)] + [("losses_repa", 0)]


@pytest.mark.parametrize(("name", "index"), CASES)
def test_losses_match_golden_values(name: str, index: int) -> None:
    model, case = build(f"train/{name}")
    run = case.meta["runs"][index]
    tr = create_transport(prediction=run["prediction"], t_eps=run["t_eps"])
    t = case[f"out.t{index}"]
    assert_close(recorded_times(run, case[f"in.tnormal{index}"]), t, rtol=1e-5, atol=1e-6)
    noise, data = case[f"in.noise{index}"], case["in.x1"]
    y = case[f"out.y_dropped{index}"]
    outputs = model(tr.interpolate(data, noise, t), t, y, all_outputs=True)
    base = tr.output_loss(outputs.base, data, noise, t)
    # The recorded loss contains that of the base head.
    loss = tr.output_loss(outputs.full, data, noise, t) + run["base_model_coeff"] * base
    assert_close(loss, case[f"out.loss{index}"], rtol=1e-4, atol=1e-6)
    assert_close(base, case[f"out.loss_base{index}"], rtol=1e-4, atol=1e-6)
    total = loss.mean()
    if outputs.repa is not None:
        repa = alignment_loss(outputs.repa, case["in.z_clean"]).mean()
        total = total + run["repa_coeff"] * repa
    assert total.item() == pytest.approx(run["total"], rel=1e-4)
    if "grad_norms" not in run:
        return
    total.backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    norms = {k: g.norm().item() for k, g in to_raev2(gradients).items()}
    assert norms == pytest.approx(run["grad_norms"], rel=1e-3)


def test_untruncated_times_reach_pure_noise() -> None:
    almost_one = torch.tensor([0.0, 1 - 2**-24])
    for prediction, truncated in (("velocity", True), ("x", False)):
        times = create_transport(
            prediction=prediction, time_dist_type="logit-normal_0_3"
        ).sample_times(almost_one)
        assert times.isfinite().all()
        assert times[0] == 0
        assert (times[1] <= 0.999) == truncated
    uniform = create_transport(prediction="x", time_dist_type="uniform")
    assert_close(uniform.sample_times(torch.tensor([0.25])), torch.tensor([0.25]))


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "rk4"])
@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_sampler_ends_at_data(method: str, prediction: str) -> None:
    tr = create_transport(prediction=prediction, time_dist_shift=3.0)
    data = torch.full((2, 3), 0.7)

    def model(x: Tensor, t: Tensor) -> Tensor:
        # Exact for a distribution of one point; the velocity is constant along the path.
        return data if prediction == "x" else noise - data

    noise = torch.randn(2, 3)
    assert_close(tr.sample_ode(model, noise, method, 6, end=0.0), data, atol=1e-5, rtol=0)
    assert not torch.allclose(tr.sample_ode(model, noise, method, 6), data, atol=1e-5, rtol=0)


def test_end_is_an_unshifted_time() -> None:
    grid = create_transport(time_dist_shift=2.0).time_grid(4, end=0.2)
    assert_close(grid, torch.tensor([1.0, 8 / 9, 0.75, 4 / 7, 1 / 3]))


def test_sde_of_data_prediction_equals_that_of_its_velocity() -> None:
    by_data = create_transport(prediction="x", time_dist_shift=2.0)
    by_velocity = create_transport(time_dist_shift=2.0)
    data, noise = torch.full((2, 3), 0.7), torch.randn(2, 3)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return velocity_from_data(data, x, expand_like(t, x), by_data.t_eps)

    found = [
        tr.sample_sde(model, noise, num_steps=20, generator=torch.Generator().manual_seed(0))
        for tr, model in ((by_data, lambda x, t: data), (by_velocity, velocity))
    ]
    assert_close(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "x", "path_type": "GVP"}, "prediction: x requires path_type Linear"),
        ({"prediction": "x", "t_eps": 0.0}, "t_eps must be above 0"),
        ({"t_eps": 1.0}, "t_eps must be at least 0 and below 1"),
        ({"prediction": "noise", "t_eps": 0.05}, "t_eps is only for velocity and x"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_transport(**options)


def test_end_of_score_prediction_must_be_finite() -> None:
    tr = create_transport(prediction="score", sample_eps=1e-3)
    with pytest.raises(UserError, match=r"end: score prediction .* give at least 0\.001"):
        tr.time_grid(4, end=0.0)
    assert len(tr.time_grid(4, end=0.001)) == 5
    with pytest.raises(UserError, match="end: expected a time"):
        tr.time_grid(4, end=-0.1)


def test_adaptive_methods_cannot_end_below_t_eps() -> None:
    tr = create_transport(prediction="x")
    with pytest.raises(UserError, match=r"dopri5 evaluates data prediction .* last step is then"):
        tr.sample_ode(lambda x, t: x, torch.randn(1, 2), "dopri5", end=0.0)
