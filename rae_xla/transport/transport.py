"""Transport: the training loss of a flow-matching network, and sampling from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.transport import ode, sde
from rae_xla.transport.losses import prediction_loss
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
        prediction: what the network predicts: ``velocity``, ``noise`` or ``score``.
        loss_weight: see :func:`losses.prediction_loss`.
        train_eps: distance of training times from the ends of the interval.
        sample_eps: the same for sampling; None if it was not given.
        time_distribution: distribution of the unshifted training times.
        time_dist_shift: the time shift.
    """

    path: Path
    prediction: str
    loss_weight: str | None
    train_eps: float
    sample_eps: float | None
    time_distribution: TimeDistribution
    time_dist_shift: float

    @property
    def train_interval(self) -> tuple[float, float]:
        """The interval of the unshifted training times."""
        return self._interval(self.train_eps)

    @property
    def ode_interval(self) -> tuple[float, float]:
        """The interval of ``1 - t``, unshifted, over which the ODE is integrated."""
        return self._interval(self._required_sample_eps())

    def sde_interval(self, diffusion_form: str, last_step_size: float) -> tuple[float, float]:
        """Return the interval of ``1 - t``, unshifted, of the SDE before its last step."""
        starts_at_noise = self.path.name == "VP" or (
            self.prediction == "velocity" and diffusion_form.lower() != "sbdm"
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
        x_t = self.path.interpolate(data, noise, expand_like(t, data))
        pred = model(x_t, t, **(model_kwargs or {}))
        loss = prediction_loss(self.path, self.prediction, self.loss_weight, pred, data, noise, t)
        return {"loss": loss, "pred": pred}

    def time_grid(self, num_steps: int) -> Tensor:
        """Return the times of an ODE sampler: (num_steps,), decreasing, float32 on the CPU."""
        require_steps(num_steps, minimum=1)
        return time_grid(self.ode_interval, num_steps, self.time_dist_shift)

    @torch.no_grad()
    def sample_ode(
        self,
        model_fn: ModelFn,
        noise: Tensor,
        method: str = "euler",
        num_steps: int = 50,
        *,
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
                torchdiffeq.
            num_steps: the number of grid *points*, as published: Euler takes ``num_steps - 1``
                steps with one evaluation each. The last point is slightly before t = 0.
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
        grid = self.time_grid(num_steps)
        if num_steps == 1:
            return noise
        if method not in ode.FIXED_STEP:
            # Adaptive methods choose their own steps between the ends of the grid.
            points = grid if method in ode.MULTISTEP else grid[[0, -1]]
            x = ode.torchdiffeq_states(
                model_fn, self._velocity, noise, points, method, rtol=rtol, atol=atol
            )[-1]
            if progress is not None:
                progress(1, 1)
            return x
        states = ode.fixed_step_states(
            model_fn, self._velocity, noise, grid, method, compile_step=compile_step
        )
        return last_state(states, num_steps - 1, progress)

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
        return output if self.prediction == "velocity" else self._fields(output, x, t)[0]

    def _fields(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return velocity and score, given the network's output."""
        tx = expand_like(t, x)
        if self.prediction == "velocity":
            return output, self.path.score_from_velocity(output, x, tx)
        score = output if self.prediction == "score" else self.path.score_from_noise(output, tx)
        return self.path.velocity_from_score(score, x, tx), score

    def _interval(self, eps: float) -> tuple[float, float]:
        if self.path.name == "VP":
            return 0.0, 1 - eps
        if self.prediction == "velocity":
            return 0.0, VELOCITY_END
        return eps, 1 - eps

    def _required_sample_eps(self) -> float:
        if self.sample_eps is None:
            raise UserError(
                f"sample_eps: sampling with {self.prediction} prediction on the {self.path.name} "
                "path is singular at t = 0 and t = 1; set the distance to keep from them, such as "
                "sample_eps=1e-3"
            )
        return self.sample_eps
