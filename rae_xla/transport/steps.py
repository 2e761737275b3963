"""Solver steps: functions of tensors that a backend compiles once. Shared by ODE and SDE solvers.

A backend that compiles graphs requires the same graph at every step. Therefore a step takes its
times as a small tensor, the *clock*: the times of its stages, then the step size. The clock is one
vector rather than several scalars because XLA embeds a scalar that happens to be 0 or 1 in the
graph as a constant, which would cause a recompilation. Only the branch of the model (guided or
not) may differ between steps; it is chosen on the host, and there is one step function per branch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.ops.dispatch import requires_static_graph

# (x (B, ...), t (B,)) -> prediction of the shape of x
ModelFn = Callable[[Tensor, Tensor], Tensor]
Step = Callable[..., Tensor]
CompileStep = Callable[[Step], Step]
# Called with (completed steps, total steps).
Progress = Callable[[int, int], None]


def model_at(model_fn: ModelFn, time: float) -> ModelFn:
    """Return the function to evaluate at ``time``: ``model_fn.at(time)`` if it has ``at``."""
    at = getattr(model_fn, "at", None)
    return model_fn if at is None else at(time)


def step_for_branches(
    make_step: Callable[[tuple[ModelFn, ...]], Step], compile_step: CompileStep | None
) -> Callable[[tuple[ModelFn, ...]], Step]:
    """Return a function from model branches to their step, built and compiled at most once.

    Args:
        make_step: builds the step from the branch of the model at each stage.
        compile_step: compiles a step; None leaves it as it is.
    """

    @functools.cache
    def step_for(branches: tuple[ModelFn, ...]) -> Step:
        step = make_step(branches)
        return step if compile_step is None else compile_step(step)

    return step_for


def make_clock(stage_times: Sequence[Tensor], dt: Tensor) -> Tensor:
    """Return the clock of one step: the stage times and the step size, float32 on the CPU."""
    return torch.stack([*stage_times, dt]).float()


def on_device(clocks: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the clocks of all steps on the device, in order.

    All at once: each copy from the CPU makes the host wait until the device has finished all its
    work, so that it could not run ahead of it. On XLA, where a copy waits for nothing, a clock must
    be an input of the step's graph rather than a part of a larger tensor.

    Args:
        clocks: of one length, on the CPU.
        device: of the state.
    """
    if requires_static_graph(device):
        yield from (clock.to(device) for clock in clocks)
    else:
        yield from torch.stack(list(clocks)).to(device)


def last_state(states: Iterator[Tensor], total: int, progress: Progress | None) -> Tensor:
    """Return the last state that a solver yields, and report each of its ``total`` steps."""
    for done, state in enumerate(states, start=1):
        last = state
        if progress is not None:
            progress(done, total)
    return last


def require_steps(num_steps: int, minimum: int) -> None:
    """Raise if ``num_steps`` is not an integer of at least ``minimum``.

    Raises:
        UserError: if it is not.
    """
    if not isinstance(num_steps, int) or num_steps < minimum:
        raise UserError(f"num_steps must be an integer of at least {minimum}, got {num_steps!r}")


def choose(option: str, value: object, valid: Sequence[str]) -> str:
    """Return the element of ``valid`` that equals ``value``, ignoring case.

    Args:
        option: name of the option, for the error message.
        value: the configured value.
        valid: valid values in their canonical case.

    Raises:
        UserError: if there is none.
    """
    for name in valid:
        if str(value).lower() == name.lower():
            return name
    raise UserError(f"{option}: {value!r} is not one of {', '.join(valid)}")
