"""Denoiser: the ODE or SDE solver with guidance, from noise to latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rae_xla.runtime import Backend
from rae_xla.transport import guided
from rae_xla.transport.internal_guidance import InternallyGuided, Strength
from rae_xla.transport.transport import Transport

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.transport.guidance import Guided

Progress = Callable[[int, int], None]
"""Called with (solver steps done, solver steps in total)."""

StepNoise = Callable[[int, Tensor], Tensor]
"""(index of an SDE step, x) -> standard normal noise with the shape and device of x."""


class Denoiser:
    """Integrates a flow from noise (t = 1) to latents (t = 0), as a configuration describes it.

    Args:
        config: its ``sampler`` and ``guidance`` sections.
        backend: of the models; it compiles the solver's steps.
        transport: the flow.
        model: ``model(x, t, y)``, placed, in eval mode.
        null_label: label or condition of the unconditional prediction.
        guide: the guidance model of autoguidance, placed.
        ode_points: points of the ODE's time grid; None: ``sampler.params.num_steps``.
    """

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        transport: Transport,
        model: nn.Module,
        *,
        null_label: int | Tensor | None = None,
        guide: nn.Module | None = None,
        ode_points: int | None = None,
    ) -> None:
        self._config, self._backend, self._transport = config, backend, transport
        self._model, self._guide, self._null_label = model, guide, null_label
        self._ode_points = config.sampler.params.num_steps if ode_points is None else ode_points
        self._guided: Guided | InternallyGuided | None = None
        self._steps = _CompiledSteps(backend.compile)

    def __call__(
        self,
        noise: Tensor,
        labels: Tensor,
        step_noise: StepNoise | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Integrate one batch.

        Args:
            noise: (B, C, h, w) standard normal, on the devices.
            labels: (B,) int64 labels, or (B, ...) conditions, on the devices.
            step_noise: the noise of each SDE step.
            progress: called after every solver step.

        Returns:
            Latents (B, C, h, w), on the devices.
        """
        if self._guided is None:
            self._guided = self._guide_by(labels)
        self._guided.y = labels
        self._steps.start_batch(self._guided)
        sampler = self._config.sampler.params
        shared: dict[str, Any] = {
            "method": sampler.sampling_method,
            "compile_step": self._steps,
            "progress": progress,
        }
        if self._config.sampler.mode == "ODE":
            return self._transport.sample_ode(
                self._guided,
                noise,
                num_steps=self._ode_points,
                end=sampler.end,
                rtol=sampler.rtol,
                atol=sampler.atol,
                **shared,
            )
        return self._transport.sample_sde(
            self._guided,
            noise,
            num_steps=sampler.num_steps,
            diffusion_form=sampler.diffusion_form,
            diffusion_norm=sampler.diffusion_norm,
            last_step=sampler.last_step,
            last_step_size=sampler.last_step_size,
            step_noise=step_noise,
            **shared,
        )

    def _guide_by(self, labels: Tensor) -> Guided | InternallyGuided:
        guidance = self._config.guidance

        def in_precision(module: nn.Module) -> Callable[..., Any]:
            def call(*inputs: Tensor, **options: Any) -> Any:
                with self._backend.autocast():
                    out = module(*inputs, **options)
                return out.float() if isinstance(out, Tensor) else out

            return call

        options: dict[str, Any] = {}
        if guidance.method == "internal":
            cfg = guidance.cfg
            options["cfg"] = Strength(cfg.scale, (cfg.t_min, cfg.t_max))
            options["null_scale"] = guidance.unconditional_scale
        return guided(
            in_precision(self._model),
            labels,
            scale=guidance.scale,
            method=guidance.method,
            null_label=self._null_label,
            guide=None if self._guide is None else in_precision(self._guide),
            interval=(guidance.t_min, guidance.t_max),
            **options,
        )


class _CompiledSteps:
    """A ``compile_step`` that compiles during the first batch and reuses the results afterwards.

    It relies on the solver to request the same steps in the same order for every batch. Labels are
    an argument of the compiled functions: a tensor that a compiled function refers to otherwise
    must stay the same.
    """

    def __init__(self, compile_step: Callable[[Any], Any]) -> None:
        self._compile, self._compiled, self._requests = compile_step, list[Any](), 0
        self._guided: Guided | InternallyGuided | None = None

    def start_batch(self, guided: Guided | InternallyGuided) -> None:
        """Expect the steps of a new batch, from the first; ``guided`` has its labels."""
        self._guided, self._requests = guided, 0

    def __call__(self, step: Any) -> Any:
        guided = self._guided
        assert guided is not None
        if self._requests == len(self._compiled):

            def step_with_labels(labels: Tensor, *inputs: Tensor) -> Tensor:
                before, guided.y = guided.y, labels
                result: Tensor = step(*inputs)
                guided.y = before
                return result

            self._compiled.append(self._compile(step_with_labels))
        self._requests += 1
        return functools.partial(self._compiled[self._requests - 1], guided.y)
