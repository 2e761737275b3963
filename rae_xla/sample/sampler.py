"""Image sampler: noise, the ODE or SDE solver with guidance, and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rae_xla.checkpoint.provenance import check_dit_file
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.rae import RAE
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.denoiser import Denoiser, Progress, StepNoise
from rae_xla.sample.images import Pixels
from rae_xla.sample.row_sampler import GeneratedBatch, Latents, RowSampler, part_of_progress
from rae_xla.transport import create_transport

__all__ = [
    "GeneratedBatch",
    "ImageSampler",
    "Latents",
    "Progress",
    "StepNoise",
    "load_sampler",
    "make_transport",
    "part_of_progress",
]

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


class ImageSampler(RowSampler):
    """Generates images with a diffusion transformer in the latent space of an RAE.

    The noise of image ``i`` is a function of the seed and ``i``. Batch size and devices therefore
    change an image by no more than rounding. On CPUs images are bit-identical, because there the
    number of rows per device is constant (``rows.rows_per_device``).

    Args:
        config: sampler, guidance and transport settings.
        backend: where the modules are placed.
        rae: the autoencoder, placed; it decodes latents.
        model: the diffusion transformer, placed.
        guide: the guidance model of autoguidance, placed; None without autoguidance.
    """

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        rae: RAE,
        model: nn.Module,
        guide: nn.Module | None = None,
    ) -> None:
        super().__init__(backend, rae)
        self._config, self._model, self._guide = config, model, guide
        self._denoiser = Denoiser(
            config,
            backend,
            make_transport(config),
            model,
            null_label=config.misc.null_label,
            guide=guide,
        )
        self._noise_functions: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}

    def configured(self, config: RunConfig) -> ImageSampler:
        """Return a sampler of the same models with other sampler and guidance settings."""
        return ImageSampler(config, self._backend, self._rae, self._model, self._guide)

    def __call__(
        self, seed: int, indices: Tensor, labels: Tensor, progress: Progress | None = None
    ) -> Pixels:
        """Generate one batch of images; every process gets all of them.

        Args:
            seed: seed of the sample set.
            indices: (B,) int32 on the host; indices of the images within the set.
            labels: (B,) int64 on the host.
            progress: called after every solver step.

        Returns:
            (B, H, W, 3) uint8.
        """
        rows = {"indices": indices, "labels": labels}
        return self.generate_rows(seed, rows, progress)["pixels"].numpy()

    def with_latents(self, seed: int, indices: Tensor, labels: Tensor) -> tuple[Pixels, Latents]:
        """Generate one batch of images and return its latents too.

        The images equal those of :meth:`__call__`, which documents the arguments.

        Returns:
            Pixels (B, H, W, 3) uint8, and the latents (B, C, h, w) float32 that they were decoded
            from, normalised.
        """
        rows = {"indices": indices, "labels": labels}
        results = self.generate_rows(seed, rows, keep_latents=True)
        return results["pixels"].numpy(), results["latents"].float().numpy()

    def dispatch(
        self,
        seed: int,
        indices: Tensor,
        labels: Tensor,
        wanted: Tensor,
        *,
        keep_latents: bool = False,
    ) -> Callable[[], GeneratedBatch]:
        """Start one batch on the devices of all processes, without waiting for the result.

        Args:
            seed: seed of the sample set.
            indices: (B,) int32 on the host, the same in every process; B is at most
                ``rows_per_device`` times the number of batch shards, and smaller batches are
                padded.
            labels: (B,) int64 on the host.
            wanted: (B,) bool on the host; False marks padding, which is not returned.
            keep_latents: return the latents too.

        Returns:
            A function that waits for the devices and returns this process's share of the images.
        """
        rows = {"indices": indices, "labels": labels}
        return self.start_rows(seed, rows, wanted, keep_latents=keep_latents)

    def denoise(
        self,
        noise: Tensor,
        labels: Tensor,
        step_noise: StepNoise | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Integrate from noise (t = 1) to latents (t = 0).

        Args:
            noise: (B, C, h, w) standard normal, on the devices.
            labels: (B,) int64, on the devices.
            step_noise: the noise of each SDE step.
            progress: called after every solver step.

        Returns:
            Normalised latents (B, C, h, w), on the devices.
        """
        for module in (self._rae, self._model, self._guide):
            if module is not None:
                module.eval()
        return self._denoiser(noise, labels, step_noise, progress)

    @torch.no_grad()
    def _sample_latents(self, seed: int, batch: Batch, progress: Progress | None) -> Tensor:
        """Return the latents of a batch.

        Random draw 0 is the initial noise, draw k + 1 the noise of SDE step k.
        """

        def noise(draw: int) -> Tensor:
            placed = self._backend.shard_batch({"draw": torch.tensor(draw).int()})
            return self._noise_function(seed)(batch["indices"], placed["draw"])

        return self.denoise(noise(0), batch["labels"], lambda step, _: noise(step + 1), progress)

    def _noise_function(self, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a compiled function: image indices (B,) and a 0-d draw to noise (B, C, h, w)."""
        if seed not in self._noise_functions:

            def noise(indices: Tensor, draw: Tensor) -> Tensor:
                return CounterRNG(seed, draw, indices).normal("sampling noise", self.latent_size)

            self._noise_functions[seed] = self._backend.compile(noise)
        return self._noise_functions[seed]


def make_transport(config: RunConfig) -> Any:
    """Build the transport of a run from its ``transport`` section and its latents' size."""
    params = config.transport.params
    return create_transport(
        path_type=params.path_type,
        prediction=params.prediction,
        loss_weight=params.loss_weight,
        train_eps=params.train_eps,
        sample_eps=params.sample_eps,
        time_dist_type=params.time_dist_type,
        time_dist_shift=config.time_dist_shift,
        t_eps=params.t_eps,
        truncate_times=params.truncate_times,
    )


def load_sampler(config: RunConfig, backend: Backend) -> ImageSampler:
    """Build the models of a configuration, load their weights and place them.

    Raises:
        UserError: if a section or a weight file is missing, or files do not match each other.
    """
    if config.stage_1 is None or config.stage_2 is None:
        raise UserError("sampling needs both a stage_1 and a stage_2 section: add the missing one")
    if config.stage_2.ckpt is None:
        raise UserError("stage_2.ckpt is not set: give --ckpt FILE or stage_2.ckpt=FILE")
    rae = cast("RAE", instantiate(config.stage_1))
    model = instantiate(config.stage_2)
    spec = config.guidance.guidance_model
    autoguidance = config.guidance.method == "autoguidance" and config.guidance.scale > 1
    guide = instantiate(spec) if autoguidance and spec is not None else None
    check_dit_file(config.stage_2.ckpt, rae)
    if guide is not None and spec is not None:
        check_dit_file(spec.ckpt, rae)
    for module in (rae, model, guide):
        if module is not None:
            backend.place(module.requires_grad_(False))
    return ImageSampler(config, backend, rae, model, guide)
