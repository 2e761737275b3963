"""Solvers of the probability-flow ODE.

The fixed-step ones are Runge-Kutta methods, written once for every backend as tables of
coefficients. The adaptive and the multistep ones are torchdiffeq's; they look at the numbers they
compute to decide what to compute next, which XLA cannot.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport.steps import (
    CompileStep,
    ModelFn,
    Step,
    choose,
    make_clock,
    model_at,
    step_for_branches,
)

# (model output, x, t (B,)) -> dx/dt
Drift = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method (a Butcher tableau): rows a_ij, weights b_i, nodes c_i."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


# The names are torchdiffeq's; `heun` is added for `heun2`, the usual meaning of the word.
_HEUN2 = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))
FIXED_STEP = {
    "euler": Tableau((0,), ((),), (1,)),
    "heun": _HEUN2,
    "heun2": _HEUN2,
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    # Kutta's 3/8 rule, as in torchdiffeq, and not the classical fourth-order method.
    "rk4": Tableau(
        (0, 1 / 3, 2 / 3, 1),
        ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
}
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
MULTISTEP = ("explicit_adams", "implicit_adams", "fixed_adams")


def ode_method(name: str, device: torch.device) -> str:
    """The method ``name`` spells, if it can run on ``device``.

    Raises:
        UserError: there is no such method, or it is not a fixed-step one and the device is XLA.
    """
    method = choose("method", name, (*FIXED_STEP, *ADAPTIVE, *MULTISTEP))
    if device.type == "xla" and method not in FIXED_STEP:
        raise UserError(
            f"method: {method!r} chooses its steps from the values it computes and cannot run on "
            f"XLA; use a fixed-step one ({', '.join(FIXED_STEP)})"
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
    """Integrate from ``grid[0]`` to ``grid[-1]`` and yield the state at every later grid time.

    Args:
        model_fn: ``model_fn(x, t)`` with t of shape (B,); see :func:`steps.model_at`.
        drift: turns the model's output into dx/dt.
        x: the state at ``grid[0]``, (B, ...).
        grid: (num_steps,) times, float32 on the host.
        method: a name in ``FIXED_STEP``.
        compile_step: wraps the function of one step.
    """
    tableau = FIXED_STEP[method]
    step_for = step_for_branches(
        lambda branches: _make_step(tableau, branches, drift), compile_step
    )
    for now, after in itertools.pairwise(grid):
        dt = after - now
        stage_times = [after if node == 1 else now + dt * node for node in tableau.nodes]
        branches = tuple(model_at(model_fn, float(time)) for time in stage_times)
        x = step_for(branches)(x, make_clock(stage_times, dt).to(x.device))
        yield x


def torchdiffeq_states(
    model_fn: ModelFn,
    drift: Drift,
    x: Tensor,
    grid: Tensor,
    method: str,
    rtol: float,
    atol: float,
) -> Tensor:
    """Integrate with torchdiffeq: the states at every grid time, (num_steps, B, ...).

    Adaptive methods may ask for times a little beyond the end of the grid.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UserError(
            f"method: {method!r} needs torchdiffeq (pip install torchdiffeq); "
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
        # A step gives back the type it was given, whatever the model computes in.
        return (x + dt * _weighted_sum(tableau.weights, slopes)).to(x.dtype)

    return ode_step


def _weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    terms = [w * k for w, k in zip(weights, tensors, strict=True) if w != 0]
    return functools.reduce(torch.add, terms)
