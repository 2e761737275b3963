"""From labels to pictures: noise, the sampler with its guidance, the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.rae import RAE
from rae_xla.registry import instantiate
from rae_xla.runtime import Runtime
from rae_xla.runtime.random import Draws
from rae_xla.sample.pictures import Pixels, to_pixels
from rae_xla.sample.rows import collect_rows, share_rows
from rae_xla.transport import create_transport, guided

if TYPE_CHECKING:
    from rae_xla.config import RunConfig

Progress = Callable[[int, int], None]
Latents = NDArray[np.float32]


class ImageSampler:
    """Draws pictures from a diffusion transformer in the latent space of an RAE.

    Picture ``i`` of a seed has noise of its own, so the batches it is drawn in, and the devices,
    change it by no more than rounding.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        rae: RAE,
        model: nn.Module,
        guide: nn.Module | None = None,
    ) -> None:
        """All modules are placed and stay the caller's; ``guide`` is autoguidance's."""
        self._config, self._runtime = config, runtime
        self._rae, self._model, self._guide = rae, model, guide
        self._transport = make_transport(config)
        self._shape = rae.latent_size

    @property
    def runtime(self) -> Runtime:
        """Where it draws; all its processes draw together."""
        return self._runtime

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one picture's latents."""
        return self._shape

    def __call__(
        self, seed: int, rows: Tensor, labels: Tensor, progress: Progress | None = None
    ) -> Pixels:
        """Draw one batch.

        Args:
            seed: of the whole set.
            rows: (B,) int32 on the host, the pictures' numbers.
            labels: (B,) int64 on the host.
            progress: called with (solver steps done, solver steps in all).

        Returns:
            (B, H, W, 3) uint8.
        """
        return self._draw(seed, rows, labels, progress, keep_latents=False)["pixels"].numpy()

    def with_latents(self, seed: int, rows: Tensor, labels: Tensor) -> tuple[Pixels, Latents]:
        """Draw one batch; also its latents (B, C, h, w) float32, normalised, as they were decoded.

        The pictures are those of a plain call.
        """
        drawn = self._draw(seed, rows, labels, None, keep_latents=True)
        return drawn["pixels"].numpy(), drawn["latents"].float().numpy()

    @torch.no_grad()
    def _draw(
        self,
        seed: int,
        rows: Tensor,
        labels: Tensor,
        progress: Progress | None,
        *,
        keep_latents: bool,
    ) -> dict[str, Tensor]:
        runtime, shape = self._runtime, self._shape
        for module in (self._rae, self._model, self._guide):
            if module is not None:
                module.eval()
        batch = share_rows(runtime, {"rows": rows, "labels": labels})

        @runtime.compile
        def normal(rows: Tensor, step: Tensor) -> Tensor:
            return Draws(seed, step, rows).normal("sampling noise", shape)

        @runtime.compile
        def decode(latents: Tensor) -> Tensor:
            with runtime.autocast():
                return to_pixels(self._rae.decode(latents))

        def draws_of(step: int) -> Tensor:
            return normal(batch["rows"], runtime.put({"step": torch.tensor(step).int()})["step"])

        latents = self._solve(
            draws_of(0), batch["labels"], lambda step, _: draws_of(step + 1), progress
        )
        results = {"pixels": decode(latents)} | ({"latents": latents} if keep_latents else {})
        return collect_rows(runtime, batch, results)

    def _solve(
        self,
        noise: Tensor,
        labels: Tensor,
        step_noise: Callable[[int, Tensor], Tensor],
        progress: Progress | None,
    ) -> Tensor:
        guidance, sampler = self._config.guidance, self._config.sampler.params

        def in_precision(module: nn.Module) -> Callable[..., Tensor]:
            def call(*inputs: Tensor) -> Tensor:
                with self._runtime.autocast():
                    return cast("Tensor", module(*inputs)).float()

            return call

        model_fn = guided(
            in_precision(self._model),
            labels,
            scale=guidance.scale,
            method=guidance.method,
            null_label=self._config.misc.null_label,
            guide=None if self._guide is None else in_precision(self._guide),
            interval=(guidance.t_min, guidance.t_max),
        )
        shared: dict[str, Any] = {
            "method": sampler.sampling_method,
            "num_steps": sampler.num_steps,
            "compile_step": self._runtime.compile,
            "progress": progress,
        }
        if self._config.sampler.mode == "ODE":
            return self._transport.sample_ode(
                model_fn, noise, rtol=sampler.rtol, atol=sampler.atol, **shared
            )
        return self._transport.sample_sde(
            model_fn,
            noise,
            diffusion_form=sampler.diffusion_form,
            diffusion_norm=sampler.diffusion_norm,
            last_step=sampler.last_step,
            last_step_size=sampler.last_step_size,
            step_noise=step_noise,
            **shared,
        )


def make_transport(config: RunConfig) -> Any:
    """The transport of a run: its ``transport`` section and the shift of its latents' size."""
    params = config.transport.params
    return create_transport(
        path_type=params.path_type,
        prediction=params.prediction,
        loss_weight=params.loss_weight,
        train_eps=params.train_eps,
        sample_eps=params.sample_eps,
        time_dist_type=params.time_dist_type,
        time_dist_shift=config.time_dist_shift,
    )


def load_sampler(config: RunConfig, runtime: Runtime) -> ImageSampler:
    """Build and place the models a configuration names, weights and all.

    Raises:
        UserError: when a section or a weight file is missing.
    """
    if config.stage_1 is None or config.stage_2 is None:
        raise UserError("sampling needs both a stage_1 and a stage_2 section")
    if config.stage_2.ckpt is None:
        raise UserError("stage_2.ckpt names no weights: give --ckpt FILE or stage_2.ckpt=FILE")
    rae = cast("RAE", instantiate(config.stage_1))
    model = instantiate(config.stage_2)
    spec = config.guidance.guidance_model
    wanted = config.guidance.method == "autoguidance" and config.guidance.scale > 1
    guide = instantiate(spec) if wanted and spec is not None else None
    for module in (rae, model, guide):
        if module is not None:
            runtime.place(module.requires_grad_(False))
    return ImageSampler(config, runtime, rae, model, guide)
