"""SDE solvers: golden values, marginals, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_case import load_case
from torch import Tensor
from torch.testing import assert_close
from toy import toy_field, toy_model

from rae_xla.errors import UserError
from rae_xla.transport import create_transport
from rae_xla.transport.paths import PATHS
from rae_xla.transport.sde import sde_diffusion

CASE = load_case("transport/sde")
ROWS = CASE.meta["rows"]
FINITE = [row for row in ROWS if row["finite"]]


def model_fn(x: Tensor, t: Tensor) -> Tensor:
    assert t.shape == x.shape[:1]
    return toy_field(x, t, CASE["in.y"])


def sample(row: dict[str, Any], **options: Any) -> Tensor:
    tr = create_transport(time_dist_shift=row["shift"])
    defaults = {
        "method": row["method"],
        "num_steps": CASE.meta["num_steps"],
        "diffusion_form": row["form"],
        "diffusion_norm": CASE.meta["diffusion_norm"],
        "last_step": row["last_step"],
        "last_step_size": CASE.meta["last_step_size"],
    }
    return tr.sample_sde(model_fn, CASE["in.x"], **(defaults | options))


@pytest.mark.parametrize("row", FINITE, ids=lambda row: row["key"])
def test_forms_and_last_steps_match_golden_values(row: dict[str, Any]) -> None:
    states: list[Tensor] = []

    def remember(step: Any) -> Any:
        def remembering(x: Tensor, *rest: Tensor) -> Tensor:
            states.append(step(x, *rest))
            return states[-1]

        return remembering

    final = sample(row, step_noise=lambda k, like: CASE["in.noise"][k], compile_step=remember)
    key = row["key"]
    before_last = states[-1 if row["last_step"] is None else -2]
    assert_close(before_last, CASE[f"out.before_last.{key}"], rtol=1e-5, atol=5e-6)
    assert_close(final, CASE[f"out.final.{key}"], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("row", [r for r in ROWS if not r["finite"]], ids=lambda row: row["key"])
def test_nonfinite_reference_cases_raise_or_are_finite(row: dict[str, Any]) -> None:
    if row["method"] == "heun" and row["last_step"] is None:
        with pytest.raises(UserError, match="evaluates the score at t = 0"):
            sample(row)
    else:
        assert row["form"] == "constant"
        assert sample(row, generator=torch.Generator().manual_seed(0)).isfinite().all()


def test_seed_reproduces_golden_noise() -> None:
    row = next(r for r in FINITE if r["key"] == "heun.sigma.Mean.s1")
    torch.manual_seed(CASE.meta["seed"])
    from_torch = sample(row)
    generator = torch.Generator().manual_seed(CASE.meta["seed"])
    from_generator = sample(row, generator=generator)
    assert_close(from_torch, CASE["out.final.heun.sigma.Mean.s1"], rtol=1e-5, atol=5e-6)
    assert_close(from_generator, from_torch, rtol=0, atol=0)


def test_names_ignore_case_and_accept_published_spelling() -> None:
    row = next(r for r in FINITE if r["form"].startswith("incc") and r["last_step"] == "Mean")
    draws = {"step_noise": lambda k, like: CASE["in.noise"][k]}
    again = sample(
        row, method="Euler", diffusion_form="Increasing-Decreasing", last_step="mean", **draws
    )
    assert_close(again, sample(row, **draws), rtol=0, atol=0)


def test_constant_step_equals_manual_computation() -> None:
    tr, x, w = create_transport(), CASE["in.x"], CASE["in.noise"][0]
    actual = tr.sample_sde(
        model_fn,
        x,
        num_steps=2,
        diffusion_form="constant",
        diffusion_norm=0.5,
        last_step="Euler",
        last_step_size=0.25,
        step_noise=lambda k, like: w,
    )
    one, quarter = torch.ones(2), torch.full((2,), 0.25)
    v = model_fn(x, one)
    moved = x - 0.75 * (v + 0.5 * x) + 0.75**0.5 * w  # at t = 1 the score is -x
    assert_close(actual, moved - 0.25 * model_fn(moved, quarter), rtol=1e-6, atol=1e-6)


def test_forms_preserve_marginals_of_flow() -> None:
    """For N(0, 0.5²) data the exact velocity is known: all forms must give that deviation."""
    data_std = 0.5

    def exact(x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None]
        variance = (1 - t) ** 2 * data_std**2 + t**2
        return (t - (1 - t) * data_std**2) / variance * x

    tr, x = create_transport(), torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1))
    for form in ("constant", "sigma", "linear", "decreasing", "increasing-decreasing"):
        generator = torch.Generator().manual_seed(2)
        final = tr.sample_sde(
            exact, x, num_steps=100, diffusion_form=form, last_step="Euler", generator=generator
        )
        assert float(final.std()) == pytest.approx(data_std, abs=0.02), form


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("last_step", ["Mean", "Tweedie", "Euler"])
def test_paths_and_predictions_give_finite_samples(
    path: str, prediction: str, last_step: str
) -> None:
    tr = create_transport(path, prediction, sample_eps=1e-3)
    final = tr.sample_sde(
        lambda x, t: toy_model(x, t, CASE["in.y"]),
        CASE["in.x"],
        "heun",
        20,
        diffusion_form="SBDM" if path == "VP" else "sigma",
        last_step=last_step,
    )
    assert final.isfinite().all()


def test_progress_includes_last_step() -> None:
    row, done = next(r for r in FINITE if r["last_step"] == "Mean"), []
    sample(row, progress=lambda *d: done.append(d))
    assert done == [(i, 12) for i in range(1, 13)]


@pytest.mark.parametrize("path", ["Linear", "GVP"])
def test_negative_diffusion_raises(path: str) -> None:
    with pytest.raises(UserError, match=f"'SBDM' is negative on the {path} path"):
        create_transport(path).sample_sde(model_fn, CASE["in.x"], diffusion_form="SBDM")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk4"}, "method: 'rk4' is not one of euler, heun"),
        ({"diffusion_form": "cosine"}, "diffusion_form: 'cosine' is not one of constant, SBDM"),
        ({"diffusion_norm": -1.0}, "diffusion_norm"),
        ({"last_step": "Median"}, "last_step: 'Median' is not one of Mean, Tweedie, Euler"),
        ({"last_step_size": 0.0}, "last_step_size"),
        ({"num_steps": 1}, "num_steps"),
    ],
)
def test_invalid_option_error_names_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_transport().sample_sde(model_fn, CASE["in.x"], **options)


@pytest.mark.parametrize("name", PATHS)
def test_diffusion_coefficients_match_golden_values(name: str) -> None:
    plans = load_case("transport/plans")
    start = f"out.{name}.diffusion."
    for key in (k for k in plans.tensors if k.startswith(start)):
        form, expected = key.removeprefix(start), plans[key].flatten()
        if form == "SBDM" and name != "VP":
            continue  # negative, which raises an error
        diffusion = sde_diffusion(form, plans.meta["diffusion_norm"], PATHS[name])
        assert_close(diffusion(plans["in.t"]), expected, rtol=1e-5, atol=1e-6)
