"""What the ODE and the SDE solver share: a step is a function of tensors that compiles once.

A backend that compiles graphs must see the same graph at every step. So a step takes its times as
a small tensor, the *clock*: the times of its stages, then the step size. (One vector and not
several scalars: XLA bakes a scalar that happens to be 0 or 1 into the graph, which would then be
compiled again.) What may differ from step to step is which branch of the model runs, guided or
not; that is decided on the host, and every branch has a step of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rae_xla.errors import UserError

# x of shape (B, ...) and t of shape (B,) to a prediction of the shape of x.
ModelFn = Callable[[Tensor, Tensor], Tensor]
Step = Callable[..., Tensor]
CompileStep = Callable[[Step], Step]
# Called with the number of steps done and their total.
Progress = Callable[[int, int], None]


def model_at(model_fn: ModelFn, time: float) -> ModelFn:
    """The function to evaluate at ``time``: ``model_fn.at(time)`` if it has one, else itself."""
    at = getattr(model_fn, "at", None)
    return model_fn if at is None else at(time)


def step_for_branches(
    make_step: Callable[[tuple[ModelFn, ...]], Step], compile_step: CompileStep | None
) -> Callable[[tuple[ModelFn, ...]], Step]:
    """A function giving the step that runs the given branches, built and compiled at most once."""

    @functools.cache
    def step_for(branches: tuple[ModelFn, ...]) -> Step:
        step = make_step(branches)
        return step if compile_step is None else compile_step(step)

    return step_for


def make_clock(stage_times: Sequence[Tensor], dt: Tensor) -> Tensor:
    """The clock of one step, float32 on the host."""
    return torch.stack([*stage_times, dt]).float()


def last_state(states: Iterator[Tensor], total: int, progress: Progress | None) -> Tensor:
    """Run a solver that yields at least one state to its end, and report every step."""
    for done, state in enumerate(states, start=1):
        last = state
        if progress is not None:
            progress(done, total)
    return last


def require_steps(num_steps: int, least: int) -> None:
    """Refuse a number of steps that is not an integer of at least ``least``."""
    if not isinstance(num_steps, int) or num_steps < least:
        raise UserError(f"num_steps: {num_steps!r} given; it is an integer of at least {least}")


def choose(option: str, given: object, valid: Sequence[str]) -> str:
    """The name in ``valid`` that ``given`` spells, in whatever case; else a UserError."""
    for name in valid:
        if str(given).lower() == name.lower():
            return name
    raise UserError(f"{option}: {given!r} is not one of {', '.join(valid)}")
