"""Transport: the training loss of a flow-matching network, and sampling from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport import ode, sde
from rae_xla.transport.losses import prediction_loss, velocity_from_data
from rae_xla.transport.paths import Path, expand_like
from rae_xla.transport.steps import (
    CompileStep,
    ModelFn,
    Progress,
    choose,
    last_state,
    require_steps,
)
from rae_xla.transport.times import TimeDistribution, shift_time, time_grid

# Velocity prediction on the Linear and GVP paths uses the interval [0, 0.999]: training excludes
# pure noise, and sampling ends before data. 1/1000 is one of the published implementation's 1000
# nominal steps.
VELOCITY_END = 1 - 1 / 1000


@dataclass(frozen=True)
class Transport:
    """A probability path, the network's prediction target, and the distribution of times.

    Built by :func:`create_transport`. ``t = 0`` is data and ``t = 1`` is noise. Times in arguments
    and results of public methods are shifted, as the network gets them, unless stated otherwise.

    Attributes:
        path: the probability path.
        prediction: what the network predicts: ``velocity``, ``noise``, ``score`` or ``x`` (data).
        loss_weight: see :func:`losses.prediction_loss`.
        train_eps: distance of training times from the ends of the interval.
        sample_eps: the same for sampling; None if it was not given.
        time_distribution: distribution of the unshifted training times.
        time_dist_shift: the time shift.
        t_eps: see :func:`losses.velocity_from_data`.
        truncate_times: whether training times exclude pure noise.
    """

    path: Path
    prediction: str
    loss_weight: str | None
    train_eps: float
    sample_eps: float | None
    time_distribution: TimeDistribution
    time_dist_shift: float
    t_eps: float = 0.0
    truncate_times: bool = True

    @property
    def train_interval(self) -> tuple[float, float]:
        """The interval of the unshifted training times."""
        if not self.truncate_times and self._is_finite_at_data:
            return 0.0, 1.0
        return self._interval(self.train_eps)

    @property
    def ode_interval(self) -> tuple[float, float]:
        """The interval of ``1 - t``, unshifted, over which the ODE is integrated."""
        return self._interval(self._required_sample_eps())

    def sde_interval(self, diffusion_form: str, last_step_size: float) -> tuple[float, float]:
        """Return the interval of ``1 - t``, unshifted, of the SDE before its last step."""
        starts_at_noise = self.path.name == "VP" or (
            self._is_finite_at_data and diffusion_form.lower() != "sbdm"
        )
        start = 0.0 if starts_at_noise else self._required_sample_eps()
        return start, 1 - (last_step_size if last_step_size > 0 else self._required_sample_eps())

    def sample_times(self, u: Tensor) -> Tensor:
        """Transform uniform random numbers to training times.

        Args:
            u: (B,) in [0, 1).

        Returns:
            (B,) times of the time distribution, shifted; a pure function of ``u``.
        """
        t = self.time_distribution.sample(u, self.train_interval)
        return shift_time(t, self.time_dist_shift)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        data: Tensor,
        model_kwargs: Mapping[str, Any] | None = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of each sample (RAE section 4; SiT section 2.2).

        Args:
            model: called as ``model(x_t, t, **model_kwargs)``.
            data: (B, ...) clean latents.
            model_kwargs: for example ``{"y": labels}``.
            t: (B,) shifted times. If None, they are sampled with PyTorch's global generator.
            noise: standard normal noise like ``data``. If None, it is sampled likewise, before
                ``t``.

        Returns:
            ``loss`` (B,), unreduced, and ``pred``, the model's output.
        """
        if noise is None:
            noise = torch.randn_like(data)
        if t is None:
            t = self.sample_times(torch.rand(data.shape[0], device=data.device))
        pred = model(self.interpolate(data, noise, t), t, **(model_kwargs or {}))
        return {"loss": self.output_loss(pred, data, noise, t), "pred": pred}

    def interpolate(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the noisy latents (B, ...) at shifted times ``t`` (B,)."""
        return self.path.interpolate(data, noise, expand_like(t, data))

    def output_loss(self, output: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the loss (B,) of a network's output at ``interpolate(data, noise, t)``."""
        return prediction_loss(
            self.path, self.prediction, self.loss_weight, output, data, noise, t, self.t_eps
        )

    def time_grid(self, num_steps: int, end: float | None = None) -> Tensor:
        """Return the times of an ODE sampler, decreasing, float32 on the CPU.

        Args:
            num_steps: number of times.
            end: the last time, unshifted. There is then one more time, so that a method with one
                evaluation per step makes ``num_steps`` evaluations.

        Returns:
            (num_steps,), or (num_steps + 1,) with ``end``.

        Raises:
            UserError: the network's velocity is not finite at ``end``.
        """
        require_steps(num_steps, minimum=1)
        start, default_end = self.ode_interval
        if end is None:
            return time_grid((start, default_end), num_steps, self.time_dist_shift)
        if not 0 <= end < 1:
            raise UserError(f"end: expected a time from 0 to below 1, got {end!r}")
        if not self._is_finite_at_data and 1 - end > default_end:
            raise UserError(
                f"end: {self.prediction} prediction on the {self.path.name} path has no finite "
                f"velocity at {end:g}: leave it out, or give at least {1 - default_end:g}"
            )
        return time_grid((start, 1 - end), num_steps + 1, self.time_dist_shift)

    @torch.no_grad()
    def sample_ode(
        self,
        model_fn: ModelFn,
        noise: Tensor,
        method: str = "euler",
        num_steps: int = 50,
        *,
        end: float | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        compile_step: CompileStep | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Integrate the probability-flow ODE from noise to data.

        Args:
            model_fn: ``model_fn(x, t)`` with t of shape (B,), such as :func:`guided` returns.
            noise: (B, ...) standard normal, on the device to sample on.
            method: a fixed-step method (``ode.FIXED_STEP``) or, except on XLA, any method of
                torchdiffeq. With data prediction the last step is Euler's if it ends below
                ``t_eps``, and other methods than fixed-step ones cannot end there.
            num_steps: the number of grid *points*, as published: Euler takes ``num_steps - 1``
                steps with one evaluation each. The last point is slightly before t = 0. With
                ``end`` it is the number of steps.
            end: unshifted time at which sampling ends, such as 0 (RAEv2).
            rtol: relative tolerance of the adaptive methods.
            atol: absolute tolerance of the adaptive methods.
            compile_step: wraps the function of one step, so that a backend compiles it once.
                Required for speed on XLA, where otherwise all steps are traced into one graph.
            progress: called with (completed steps, total steps) after each step of a fixed-step
                method, and once after any other method.

        Returns:
            The state at the last grid point, like ``noise``.

        Raises:
            UserError: if the method is unknown or cannot run on this device, or ``sample_eps`` is
                required but None.
        """
        method = ode.ode_method(method, noise.device)
        grid = self.time_grid(num_steps, end)
        if len(grid) == 1:
            return noise
        # Below t_eps the velocity of data prediction is not that of the path: Euler's step, which
        # evaluates its start alone, is exact there, and the last one ends at the predicted data.
        ends_with_euler = self.prediction == "x" and float(grid[-1]) < self.t_eps
        if method not in ode.FIXED_STEP:
            if ends_with_euler:
                raise UserError(
                    f"method: {method} evaluates data prediction down to t = {float(grid[-1]):g}, "
                    f"below its t_eps {self.t_eps:g}; choose a fixed-step method "
                    f"({', '.join(ode.FIXED_STEP)}), whose last step is then Euler's"
                )
            # Adaptive methods choose their own steps between the ends of the grid.
            points = grid if method in ode.MULTISTEP else grid[[0, -1]]
            x = ode.torchdiffeq_states(
                model_fn, self._velocity, noise, points, method, rtol=rtol, atol=atol
            )[-1]
            if progress is not None:
                progress(1, 1)
            return x
        solve = partial(ode.fixed_step_states, model_fn, self._velocity, compile_step=compile_step)

        def states() -> Iterator[Tensor]:
            if method == "euler" or not ends_with_euler:
                yield from solve(noise, grid, method)
                return
            x = noise
            for x in solve(noise, grid[:-1], method):
                yield x
            yield from solve(x, grid[-2:], "euler")

        return last_state(states(), len(grid) - 1, progress)

    @torch.no_grad()
    def sample_sde(
        self,
        model_fn: ModelFn,
        noise: Tensor,
        method: str = "euler",
        num_steps: int = 250,
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        generator: torch.Generator | None = None,
        *,
        step_noise: sde.StepNoise | None = None,
        compile_step: CompileStep | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Integrate the reverse-time SDE from noise to data (SiT section 2.4).

        Args:
            model_fn: ``model_fn(x, t)`` with t of shape (B,), such as :func:`guided` returns.
            noise: (B, ...) standard normal, on the device to sample on.
            method: ``euler`` or ``heun``.
            num_steps: number of grid points: ``num_steps - 1`` noisy steps, followed by the last
                step.
            diffusion_form: form of D(t), one of ``sde.FORMS``.
            diffusion_norm: factor of D(t).
            last_step: ``Mean``, ``Tweedie``, ``Euler`` or None for no last step; see
                :class:`sde.LastStep`.
            last_step_size: the length of the last step, and its *unshifted* time, as published.
            generator: generator of each step's noise; by default PyTorch's global one.
            step_noise: returns each step's noise as ``step_noise(step, like)``, instead of
                ``generator``.
            compile_step: wraps the function of one step; see :meth:`sample_ode`.
            progress: called with (completed steps, total steps) after each step.

        Returns:
            The final state, like ``noise``.

        Raises:
            UserError: if an option is unknown, or a combination gives no finite numbers.
        """
        method = choose("method", method, sde.METHODS)
        require_steps(num_steps, minimum=2)
        if last_step is not None:
            last_step = choose("last_step", last_step, (*sde.LAST_STEPS, "None"))
            last_step = None if last_step == "None" else last_step
        if last_step is None:
            last_step_size = 0.0
        elif not 0 < last_step_size < 1:
            raise UserError(f"last_step_size must be between 0 and 1, got {last_step_size!r}")
        diffusion = sde.sde_diffusion(diffusion_form, diffusion_norm, self.path)
        interval = self.sde_interval(diffusion_form, last_step_size)
        grid = time_grid(interval, num_steps, self.time_dist_shift)
        step_noise = step_noise or sde.noise_from_generator(generator)
        fields, path = self._fields, self.path

        def states() -> Iterator[Tensor]:
            state = noise
            for state in sde.sde_states(
                model_fn,
                fields,
                diffusion,
                noise,
                grid,
                method,
                step_noise,
                compile_step=compile_step,
            ):
                yield state
            if last_step is not None:
                last = sde.LastStep(last_step, 1 - interval[1], last_step_size)
                yield sde.take_last_step(
                    last, model_fn, fields, diffusion, path, state, compile_step
                )

        return last_state(states(), num_steps - (last_step is None), progress)

    def _velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the probability-flow velocity, given the network's output."""
        if self.prediction == "velocity":
            return output
        if self.prediction == "x":
            return velocity_from_data(output, x, expand_like(t, x), self.t_eps)
        return self._fields(output, x, t)[0]

    def _fields(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return velocity and score, given the network's output."""
        tx = expand_like(t, x)
        if self.prediction in ("velocity", "x"):
            output = self._velocity(output, x, t)
            return output, self.path.score_from_velocity(output, x, tx)
        score = output if self.prediction == "score" else self.path.score_from_noise(output, tx)
        return self.path.velocity_from_score(score, x, tx), score

    def _interval(self, eps: float) -> tuple[float, float]:
        if self.path.name == "VP":
            return 0.0, 1 - eps
        if self._is_finite_at_data:
            return 0.0, VELOCITY_END
        return eps, 1 - eps

    @property
    def _is_finite_at_data(self) -> bool:
        """Whether the network's velocity is finite at t = 0."""
        return self.path.name != "VP" and self.prediction in ("velocity", "x")

    def _required_sample_eps(self) -> float:
        if self.sample_eps is None:
            raise UserError(
                f"sample_eps: sampling with {self.prediction} prediction on the {self.path.name} "
                "path is singular at t = 0 and t = 1; set the distance to keep from them, such as "
                "sample_eps=1e-3"
            )
        return self.sample_eps
