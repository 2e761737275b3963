"""ODE solvers: golden values, order, compilation of steps, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_case import load_case
from torch import Tensor
from torch.testing import assert_close
from toy import toy_field, toy_model

from rae_xla.errors import UserError
from rae_xla.transport import create_transport, ode
from rae_xla.transport.transport import Transport

CASE = load_case("transport/ode")
SOLVED = [row for row in CASE.meta["rows"] if "method" in row]
OTHER = [row for row in CASE.meta["rows"] if row["key"].startswith("traj_other")]


class Recorder:
    """A model function that records the times of its calls."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == x.shape[:1]
        self.times.append(float(t[0]))
        return self.network(x, t, CASE["in.y"])


def trajectory(tr: Transport, model_fn: Any, method: str, grid: Tensor) -> Tensor:
    x, drift = CASE["in.x"], tr._velocity
    if method in ode.FIXED_STEP:
        return torch.stack([x, *ode.fixed_step_states(model_fn, drift, x, grid, method)])
    return ode.torchdiffeq_states(model_fn, drift, x, grid, method, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("row", SOLVED, ids=lambda row: row["key"])
def test_solvers_match_golden_values(row: dict[str, Any]) -> None:
    tr, key = create_transport(time_dist_shift=row["shift"]), row["key"]
    model_fn = Recorder(toy_field)
    final = tr.sample_ode(model_fn, CASE["in.x"], method=row["method"], num_steps=row["num_steps"])
    if f"out.final.{key}" in CASE.tensors:
        expected = CASE[f"out.final.{key}"]
    else:
        expected = CASE[f"out.traj.{key}"]
        states = trajectory(tr, Recorder(toy_field), row["method"], tr.time_grid(row["num_steps"]))
        assert_close(states, expected, rtol=1e-5, atol=2e-6)
        expected = expected[-1]
    assert_close(final, expected, rtol=1e-5, atol=2e-6)
    assert len(model_fn.times) == row["nfe"]
    assert model_fn.times[-1] == pytest.approx(row["last_model_t"], abs=1e-6)
    if row["model_t"] is not None:
        assert model_fn.times == pytest.approx(row["model_t"], abs=1e-6)


@pytest.mark.parametrize("row", OTHER, ids=lambda row: row["key"])
def test_paths_and_predictions_match_golden_values(row: dict[str, Any]) -> None:
    _, path, prediction = row["key"].split(".")
    tr = create_transport(
        path, prediction, train_eps=row["train_eps"], sample_eps=row["sample_eps"]
    )
    states = trajectory(tr, Recorder(toy_model), "euler", tr.time_grid(row["num_steps"]))
    assert_close(states, CASE[f"out.{row['key']}"], rtol=1e-5, atol=1e-5)


def test_heun_is_heun2_and_names_ignore_case() -> None:
    tr, x = create_transport(), CASE["in.x"]
    results = [tr.sample_ode(Recorder(toy_field), x, m, 6) for m in ("heun", "heun2", "Heun")]
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert_close(results[0], results[2], rtol=0, atol=0)


def test_runge_kutta_tables_have_their_order() -> None:
    """For dx/dt = x, halving the step divides the error of a method of order p by 2^p."""
    x = torch.ones(1, 1, dtype=torch.float64)

    def error(method: str, n: int) -> float:
        grid = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        *_, last = ode.fixed_step_states(lambda x, t: x, lambda out, x, t: out, x, grid, method)
        return abs(float(last) - torch.e)

    for method, order in {"euler": 1, "heun2": 2, "midpoint": 2, "heun3": 3, "rk4": 4}.items():
        ratio = error(method, 8) / error(method, 16)
        assert 2 ** (order - 0.3) < ratio < 2 ** (order + 0.3), method


def test_solver_selects_branch_by_time_and_compiles_each_once() -> None:
    class TwoBranches:
        def at(self, time: float) -> Any:
            return self.early if time > 0.5 else self.late

        def early(self, x: Tensor, t: Tensor) -> Tensor:
            return x

        def late(self, x: Tensor, t: Tensor) -> Tensor:
            return -x

    compiled: list[Any] = []

    def compile_step(step: Any) -> Any:
        compiled.append(step)
        return step

    done: list[tuple[int, int]] = []
    tr, x = create_transport(), torch.ones(2, 3)
    final = tr.sample_ode(
        TwoBranches(),
        x,
        num_steps=11,
        compile_step=compile_step,
        progress=lambda *d: done.append(d),
    )
    grid = tr.time_grid(11)
    growth = 1 + torch.where(grid[:-1] > 0.5, 1, -1) * grid.diff()
    assert_close(final, x * growth.prod())
    assert len(compiled) == 2
    assert done == [(i, 10) for i in range(1, 11)]


def test_adaptive_solver_selects_branch_by_time() -> None:
    times: list[float] = []

    class OneBranch:
        def at(self, time: float) -> Any:
            times.append(time)
            return lambda x, t: x

    tr, x, done = create_transport(), torch.ones(2, 3), []
    final = tr.sample_ode(
        OneBranch(), x, method="dopri5", num_steps=4, progress=lambda *d: done.append(d)
    )
    assert_close(final, x * torch.exp(torch.tensor(-0.999)), rtol=1e-3, atol=0)
    assert times[0] == 1
    assert done == [(1, 1)]


def test_one_grid_point_returns_noise() -> None:
    x = CASE["in.x"]
    assert_close(create_transport().sample_ode(Recorder(toy_field), x, num_steps=1), x)


@pytest.mark.parametrize("num_steps", [0, -3, 2.5])
def test_invalid_number_of_steps_raises(num_steps: Any) -> None:
    with pytest.raises(UserError, match="num_steps"):
        create_transport().sample_ode(Recorder(toy_field), CASE["in.x"], num_steps=num_steps)


def test_unknown_method_error_lists_valid_names() -> None:
    with pytest.raises(UserError, match=r"method: 'rk45' is not one of euler, heun, .*dopri5"):
        create_transport().sample_ode(Recorder(toy_field), CASE["in.x"], method="rk45")


@pytest.mark.parametrize("method", [*ode.ADAPTIVE, *ode.MULTISTEP])
def test_adaptive_methods_raise_on_xla(method: str) -> None:
    with pytest.raises(UserError, match="not possible on XLA"):
        ode.ode_method(method, torch.device("xla"))


@pytest.mark.parametrize("method", [*ode.ADAPTIVE, "implicit_adams", "fixed_adams"])
def test_torchdiffeq_methods_agree(method: str) -> None:
    tr = create_transport()
    expected = tr.sample_ode(Recorder(toy_field), CASE["in.x"], method="rk4", num_steps=50)
    actual = tr.sample_ode(
        Recorder(toy_field), CASE["in.x"], method=method, num_steps=50, rtol=1e-5, atol=1e-6
    )
    assert_close(actual, expected, rtol=0, atol=5e-3)
