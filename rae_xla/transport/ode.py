"""Solvers of the probability-flow ODE.

Fixed-step solvers are Runge-Kutta methods, implemented here from tables of coefficients because
their steps must compile once on every backend. Adaptive and multistep solvers are torchdiffeq's:
their steps depend on computed values, which a device with static graphs does not support.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.ops.dispatch import requires_static_graph
from rae_xla.transport.steps import (
    CompileStep,
    ModelFn,
    Step,
    choose,
    make_clock,
    model_at,
    on_device,
    step_for_branches,
)

# (model output, x, t (B,)) -> dx/dt
Drift = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """Butcher tableau of an explicit Runge-Kutta method.

    Attributes:
        nodes: c_i, the times of the stages as fractions of the step.
        rows: a_ij, the weights of the earlier slopes in the state of stage i.
        weights: b_i, the weights of the slopes in the step.
    """

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# torchdiffeq's names, and `heun` for `heun2`, which is what the name usually means.
_HEUN2 = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
FIXED_STEP = {
    "euler": Tableau((0,), ((),), (1,)),
    "heun": _HEUN2,
    "heun2": _HEUN2,
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    # Kutta's 3/8 rule, as in torchdiffeq, not the classical fourth-order method.
    "rk4": Tableau(
        (0, 1 / 3, 2 / 3, 1),
        ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
MULTISTEP = ("explicit_adams", "implicit_adams", "fixed_adams")


def ode_method(name: str, device: torch.device) -> str:
    """Return the canonical name of an ODE method after checking that it can run on ``device``.

    Args:
        name: name of the method, in any case.
        device: device of the samples.

    Raises:
        UserError: if the method is unknown, or not a fixed-step one on a device that requires
            static graphs, such as XLA.
    """
    method = choose("method", name, (*FIXED_STEP, *ADAPTIVE, *MULTISTEP))
    if requires_static_graph(device) and method not in FIXED_STEP:
        raise UserError(
            f"method: {method!r} chooses its steps from computed values, which is not possible on "
            f"{device.type.upper()}; choose a fixed-step method ({', '.join(FIXED_STEP)})"
        )
    return method


def fixed_step_states(
    model_fn: ModelFn,
    drift: Drift,
    x: Tensor,
    grid: Tensor,
    method: str,
    compile_step: CompileStep | None = None,
) -> Iterator[Tensor]:
    """Integrate from ``grid[0]`` to ``grid[-1]`` and yield the state at each later grid time.

    Args:
        model_fn: ``model_fn(x, t)`` with t of shape (B,); see :func:`steps.model_at`.
        drift: computes dx/dt from the model's output, x and t.
        x: the state at ``grid[0]``, (B, ...).
        grid: (num_steps,) times, float32 on the CPU.
        method: a name in ``FIXED_STEP``.
        compile_step: wraps the function of one step, for example to compile it.
    """
    tableau = FIXED_STEP[method]
    step_for = step_for_branches(
        lambda branches: _make_step(tableau, branches, drift), compile_step
    )
    times = [_stage_times(tableau, now, after) for now, after in itertools.pairwise(grid)]
    steps = (after - now for now, after in itertools.pairwise(grid))
    clocks = [make_clock(of_step, dt) for of_step, dt in zip(times, steps, strict=True)]
    for stage_times, clock in zip(times, on_device(clocks, x.device), strict=True):
        branches = tuple(model_at(model_fn, float(time)) for time in stage_times)
        x = step_for(branches)(x, clock)
        yield x


def _stage_times(tableau: Tableau, now: Tensor, after: Tensor) -> list[Tensor]:
    return [after if node == 1 else now + (after - now) * node for node in tableau.nodes]


def torchdiffeq_states(
    model_fn: ModelFn,
    drift: Drift,
    x: Tensor,
    grid: Tensor,
    method: str,
    rtol: float,
    atol: float,
) -> Tensor:
    """Integrate with torchdiffeq.

    Adaptive methods may evaluate the model at times slightly beyond the end of the grid.

    Args:
        model_fn: ``model_fn(x, t)`` with t of shape (B,); see :func:`steps.model_at`.
        drift: computes dx/dt from the model's output, x and t.
        x: the state at ``grid[0]``, (B, ...).
        grid: (num_steps,) times, float32.
        method: a name in ``ADAPTIVE`` or ``MULTISTEP``.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Returns:
        The states at all grid times, (num_steps, B, ...).

    Raises:
        UserError: if torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UserError(
            f"method: {method!r} requires torchdiffeq (pip install torchdiffeq); "
            f"{', '.join(FIXED_STEP)} do not"
        ) from None

    def slope(time: Tensor, x: Tensor) -> Tensor:
        t = time.expand(x.shape[0])
        evaluate = model_at(model_fn, float(time)) if hasattr(model_fn, "at") else model_fn
        return drift(evaluate(x, t), x, t)

    return odeint(slope, x, grid.to(x.device), method=method, rtol=rtol, atol=atol)


def _make_step(tableau: Tableau, branches: tuple[ModelFn, ...], drift: Drift) -> Step:
    def ode_step(x: Tensor, clock: Tensor) -> Tensor:
        dt = clock[-1]
        slopes: list[Tensor] = []
        for i, branch in enumerate(branches):
            x_i = x + dt * _weighted_sum(tableau.rows[i], slopes) if slopes else x
            t = clock[i].expand(x.shape[0])
            slopes.append(drift(branch(x_i, t), x_i, t))
        # The state keeps its dtype, whatever dtype the model computes in.
        return (x + dt * _weighted_sum(tableau.weights, slopes)).to(x.dtype)

    return ode_step


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    terms = [w * k for w, k in zip(weights, tensors, strict=True) if w != 0]
    return functools.reduce(torch.add, terms)
