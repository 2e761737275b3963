"""Training loss: golden values, random numbers, gradient."""

from __future__ import annotations

import pytest
import torch
from golden_case import load_case
from torch.testing import assert_close
from toy import toy_model

from rae_xla.transport import create_transport

CASE = load_case("transport/training_losses")


@pytest.mark.parametrize("key", [row["key"] for row in CASE.meta["rows"]])
def test_loss_matches_golden_values(key: str) -> None:
    path, prediction, weight = key.split(".")
    tr = create_transport(path, prediction, None if weight == "none" else weight)
    out = tr.training_losses(
        toy_model,
        CASE["in.x1_data"],
        {"y": CASE["in.y"]},
        t=CASE["in.t"],
        noise=CASE["in.x0_noise"],
    )
    assert out["pred"].shape == CASE["in.x1_data"].shape
    assert_close(out["loss"], CASE[f"out.loss.{key}"], rtol=1e-5, atol=1e-6)


def test_missing_noise_and_times_use_global_generator_noise_first() -> None:
    tr = create_transport(time_dist_type="logit-normal_0_1", time_dist_shift=6.93)
    data, y = torch.randn(4, 2, 3, 3), torch.arange(4)
    torch.manual_seed(5)
    generated = tr.training_losses(toy_model, data, {"y": y})
    torch.manual_seed(5)
    noise = torch.randn_like(data)
    t = tr.sample_times(torch.rand(4))
    given = tr.training_losses(toy_model, data, {"y": y}, t=t, noise=noise)
    assert_close(generated["loss"], given["loss"], rtol=0, atol=0)


def test_loss_has_gradient() -> None:
    tr = create_transport()
    weight = torch.tensor(0.3, requires_grad=True)
    data = torch.randn(2, 2, 3, 3)
    loss = tr.training_losses(lambda x, t: weight * x, data)["loss"].mean()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad != 0
