"""Solvers of the reverse-time SDE: the probability flow with Langevin noise of any strength.

With velocity v, score s and diffusion D(t), a step from t to t - dt is

    x <- x - (v - D s) dt + sqrt(2 D dt) w,        w ~ N(0, 1),

which has the same marginal distributions for all D >= 0 (SiT, section 2.4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport.paths import Path, expand_like
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

# (model output, x, t (B,)) -> (velocity, score)
Fields = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Diffusion = Callable[[Tensor], Tensor]
# (index of the step, tensor with the required shape and device) -> standard normal noise
StepNoise = Callable[[int, Tensor], Tensor]

METHODS = ("euler", "heun")
LAST_STEPS = ("Mean", "Tweedie", "Euler")
FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
# Misspelt in the published configurations.
_PUBLISHED_SPELLING = {"inccreasing-decreasing": "increasing-decreasing"}


def sde_diffusion(form: str, norm: float, path: Path) -> Diffusion:
    """Return the diffusion coefficient D(t) of a named form.

    Args:
        form: one of ``FORMS``, in any case.
        norm: factor of the coefficient.
        path: the probability path.

    Raises:
        UserError: if the form is unknown, or D would be negative at some time.
    """
    form = choose("diffusion_form", _PUBLISHED_SPELLING.get(str(form).lower(), form), FORMS)
    if not (math.isfinite(norm) and norm >= 0):
        raise UserError(f"diffusion_norm must be a finite number of at least 0, got {norm!r}")
    if form == "SBDM" and path.drift_variance(torch.tensor(0.5)) < 0:
        raise UserError(
            f"diffusion_form: 'SBDM' is negative on the {path.name} path; choose 'sigma' or "
            "'linear'"
        )
    forms: dict[str, Diffusion] = {
        "constant": lambda t: torch.full_like(t, norm),
        "SBDM": lambda t: norm * path.drift_variance(t),
        "sigma": lambda t: norm * path.sigma(t),
        "linear": lambda t: norm * t,
        "decreasing": lambda t: 0.25 * (norm * torch.cos(math.pi * (1 - t)) + 1) ** 2,
        "increasing-decreasing": lambda t: norm * torch.sin(math.pi * (1 - t)) ** 2,
    }
    return forms[form]


def sde_states(
    model_fn: ModelFn,
    fields: Fields,
    diffusion: Diffusion,
    x: Tensor,
    grid: Tensor,
    method: str,
    step_noise: StepNoise,
    compile_step: CompileStep | None = None,
) -> Iterator[Tensor]:
    """Integrate along ``grid`` and yield the state at each time after the first.

    Args:
        model_fn: ``model_fn(x, t)`` with t of shape (B,); see :func:`steps.model_at`.
        fields: computes velocity and score from the model's output, x and t.
        diffusion: D(t).
        x: the state at ``grid[0]``, (B, ...).
        grid: (num_steps,) decreasing times, float32 on the CPU.
        method: a name in ``METHODS``.
        step_noise: returns the standard normal noise of each step.
        compile_step: wraps the function of one step, for example to compile it.

    Raises:
        UserError: if the method would evaluate the score at t = 0, where it is not finite.
    """
    if method == "heun" and float(grid[-1]) <= 0:
        raise UserError(
            "last_step: method 'heun' without a last step evaluates the score at t = 0, where it "
            f"is not finite; choose one of {', '.join(LAST_STEPS)}, or method 'euler'"
        )
    make_step = {"euler": _euler_step, "heun": _heun_step}[method]
    step_for = step_for_branches(
        lambda branches: make_step(branches, fields, diffusion), compile_step
    )
    pairs = list(itertools.pairwise(grid))
    times = [[now] if method == "euler" else [now, after] for now, after in pairs]
    clocks = [
        make_clock(of_step, now - after) for of_step, (now, after) in zip(times, pairs, strict=True)
    ]
    for k, (stage_times, clock) in enumerate(zip(times, on_device(clocks, x.device), strict=True)):
        branches = tuple(model_at(model_fn, float(time)) for time in stage_times)
        x = step_for(branches)(x, step_noise(k, x), clock)
        yield x


@dataclass(frozen=True)
class LastStep:
    """The last step of the sampler, without noise.

    Attributes:
        kind: ``Mean``, the mean of an Euler step of the SDE; ``Euler``, an Euler step of the ODE;
            or ``Tweedie``, the expected data given the state.
        time: the time at which it starts.
        size: the length of the step.
    """

    kind: str
    time: float
    size: float


def take_last_step(
    last: LastStep,
    model_fn: ModelFn,
    fields: Fields,
    diffusion: Diffusion,
    path: Path,
    x: Tensor,
    compile_step: CompileStep | None = None,
) -> Tensor:
    """Return the state after the last step.

    Args:
        last: kind, time and size of the step.
        model_fn: see :func:`sde_states`, also for ``fields``, ``diffusion`` and ``compile_step``.
        fields: computes velocity and score.
        diffusion: D(t).
        path: the probability path.
        x: the state at ``last.time``, (B, ...).
        compile_step: wraps the function of the step.
    """
    branch = model_at(model_fn, last.time)

    def last_step(x: Tensor, clock: Tensor) -> Tensor:
        t = clock[0].expand(x.shape[0])
        velocity, score = fields(branch(x, t), x, t)
        tx = expand_like(t, x)
        if last.kind == "Tweedie":
            x_next = (x + path.sigma(tx) ** 2 * score) / path.alpha(tx)
        elif last.kind == "Mean":
            x_next = x - clock[-1] * (velocity - diffusion(tx) * score)
        else:
            x_next = x - clock[-1] * velocity
        return x_next.to(x.dtype)

    step = last_step if compile_step is None else compile_step(last_step)
    clock = make_clock([torch.tensor(last.time)], torch.tensor(last.size))
    return step(x, *on_device([clock], x.device))


def noise_from_generator(generator: torch.Generator | None) -> StepNoise:
    """Return step noise from ``generator``, or from PyTorch's global generator if it is None."""

    def step_noise(step: int, like: Tensor) -> Tensor:
        device = like.device if generator is None else generator.device
        return torch.randn(like.shape, generator=generator, device=device).to(like)

    return step_noise


def _reverse_drift(branch: ModelFn, fields: Fields, diffusion: Diffusion) -> ModelFn:
    """Return the function (x, t) -> v - D s."""

    def reverse_drift(x: Tensor, t: Tensor) -> Tensor:
        velocity, score = fields(branch(x, t), x, t)
        return velocity - diffusion(expand_like(t, x)) * score

    return reverse_drift


def _add_noise(x: Tensor, w: Tensor, clock: Tensor, diffusion: Diffusion) -> Tensor:
    return x + torch.sqrt(2 * diffusion(clock[0])) * w * torch.sqrt(clock[-1])


def _euler_step(branches: tuple[ModelFn, ...], fields: Fields, diffusion: Diffusion) -> Step:
    drift = _reverse_drift(branches[0], fields, diffusion)

    def sde_step(x: Tensor, w: Tensor, clock: Tensor) -> Tensor:
        mean = x - clock[-1] * drift(x, clock[0].expand(x.shape[0]))
        return _add_noise(mean, w, clock, diffusion).to(x.dtype)

    return sde_step


def _heun_step(branches: tuple[ModelFn, ...], fields: Fields, diffusion: Diffusion) -> Step:
    first, second = (_reverse_drift(branch, fields, diffusion) for branch in branches)

    def sde_step(x: Tensor, w: Tensor, clock: Tensor) -> Tensor:
        dt, batch = clock[-1], x.shape[0]
        noisy = _add_noise(x, w, clock, diffusion)
        k_1 = first(noisy, clock[0].expand(batch))
        k_2 = second(noisy - dt * k_1, clock[1].expand(batch))
        return (noisy - 0.5 * dt * (k_1 + k_2)).to(x.dtype)

    return sde_step
