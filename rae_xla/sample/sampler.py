"""Image sampler: noise, the ODE or SDE solver with guidance, and the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rae_xla.checkpoint.provenance import check_dit_file
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.rae import RAE
from rae_xla.ops.random import CounterRNG
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import Pixels, to_pixels
from rae_xla.sample.rows import collect_rows, pad_rows, rows_per_device, share_rows
from rae_xla.transport import create_transport, guided

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.transport.guidance import Guided

Progress = Callable[[int, int], None]
"""Called with (solver steps done, solver steps in total)."""

StepNoise = Callable[[int, Tensor], Tensor]
"""(index of an SDE step, x) -> standard normal noise with the shape and device of x."""

Latents = NDArray[np.float32]


@dataclass(frozen=True)
class GeneratedBatch:
    """Images that this process has generated.

    Attributes:
        indices: (B,) indices of the images within the sample set.
        pixels: (B, H, W, 3).
        latents: (B, C, h, w), normalised, as they were decoded; None unless requested.
    """

    indices: NDArray[np.int32]
    pixels: Pixels
    latents: Latents | None


class ImageSampler:
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
        self._config, self._backend = config, backend
        self._rae, self._model, self._guide = rae, model, guide
        self._transport = make_transport(config)
        self._shape = rae.latent_size
        self._guided: Guided | None = None
        self._steps = _CompiledSteps(backend.compile)
        self._decode = backend.compile(self._to_pixels)
        self._noise_functions: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}

    @property
    def backend(self) -> Backend:
        """The backend that it runs on; all processes of it must sample together."""
        return self._backend

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of one image."""
        return self._shape

    def rows_per_device(self, batch: int) -> int:
        """Return how many images each device generates together for a batch of ``batch``."""
        return rows_per_device(self._backend, batch, tokens=self._shape[1] * self._shape[2])

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
        results = self._generate(seed, indices, labels, progress, keep_latents=False)
        return results["pixels"].numpy()

    def with_latents(self, seed: int, indices: Tensor, labels: Tensor) -> tuple[Pixels, Latents]:
        """Generate one batch of images and return its latents too.

        The images equal those of :meth:`__call__`, which documents the arguments.

        Returns:
            Pixels (B, H, W, 3) uint8, and the latents (B, C, h, w) float32 that they were decoded
            from, normalised.
        """
        results = self._generate(seed, indices, labels, None, keep_latents=True)
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
        batch = self._share(indices, labels, wanted=wanted)
        latents = self._sample_latents(seed, batch, None)
        with self._backend.side_stream([latents, *batch.values()]):
            results = {"pixels": self._decode(latents)}
            results |= {name: batch[name] for name in ("indices", "wanted")}
            results |= {"latents": latents} if keep_latents else {}
            copies = self._backend.local_rows(results)

        def wait() -> GeneratedBatch:
            own = copies()
            kept = own["wanted"].bool()
            return GeneratedBatch(
                own["indices"][kept].numpy(),
                own["pixels"][kept].numpy(),
                own["latents"][kept].float().numpy() if keep_latents else None,
            )

        return wait

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
        if self._guided is None:
            self._guided = self._guide_by(labels)
        self._guided.y = labels
        self._steps.start_batch()
        sampler = self._config.sampler.params
        shared: dict[str, Any] = {
            "method": sampler.sampling_method,
            "num_steps": sampler.num_steps,
            "compile_step": self._steps,
            "progress": progress,
        }
        if self._config.sampler.mode == "ODE":
            return self._transport.sample_ode(
                self._guided, noise, rtol=sampler.rtol, atol=sampler.atol, **shared
            )
        return self._transport.sample_sde(
            self._guided,
            noise,
            diffusion_form=sampler.diffusion_form,
            diffusion_norm=sampler.diffusion_norm,
            last_step=sampler.last_step,
            last_step_size=sampler.last_step_size,
            step_noise=step_noise,
            **shared,
        )

    def _guide_by(self, labels: Tensor) -> Guided:
        guidance = self._config.guidance

        def in_precision(module: nn.Module) -> Callable[..., Tensor]:
            def call(*inputs: Tensor) -> Tensor:
                with self._backend.autocast():
                    return cast("Tensor", module(*inputs)).float()

            return call

        return guided(
            in_precision(self._model),
            labels,
            scale=guidance.scale,
            method=guidance.method,
            null_label=self._config.misc.null_label,
            guide=None if self._guide is None else in_precision(self._guide),
            interval=(guidance.t_min, guidance.t_max),
        )

    def _to_pixels(self, latents: Tensor) -> Tensor:
        with torch.no_grad(), self._backend.autocast():
            return to_pixels(self._rae.decode(latents))

    def _share(self, indices: Tensor, labels: Tensor, **more: Tensor) -> Batch:
        return share_rows(self._backend, {"indices": indices, "labels": labels, **more})

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
                return CounterRNG(seed, draw, indices).normal("sampling noise", self._shape)

            self._noise_functions[seed] = self._backend.compile(noise)
        return self._noise_functions[seed]

    def _generate(
        self,
        seed: int,
        indices: Tensor,
        labels: Tensor,
        progress: Progress | None,
        *,
        keep_latents: bool,
    ) -> dict[str, Tensor]:
        """Generate all images, round by round, and gather them on every process."""
        size = self.rows_per_device(len(indices)) * self._backend.mesh.batch_shards
        rounds = list(zip(indices.split(size), labels.split(size), strict=True))
        outputs: list[dict[str, Tensor]] = []
        for number, (round_indices, round_labels) in enumerate(rounds):
            batch = self._share(pad_rows(round_indices, size), pad_rows(round_labels, size))
            latents = self._sample_latents(
                seed, batch, part_of_progress(progress, number, len(rounds))
            )
            results = {"pixels": self._decode(latents)}
            results |= {"latents": latents} if keep_latents else {}
            gathered = collect_rows(self._backend, batch, results)
            outputs.append({name: rows[: len(round_indices)] for name, rows in gathered.items()})
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


class _CompiledSteps:
    """A ``compile_step`` that compiles during the first batch and reuses the results afterwards.

    It relies on the solver to request the same steps in the same order for every batch.
    """

    def __init__(self, compile_step: Callable[[Any], Any]) -> None:
        self._compile, self._compiled, self._requests = compile_step, list[Any](), 0

    def start_batch(self) -> None:
        """Expect the steps of a new batch, from the first."""
        self._requests = 0

    def __call__(self, step: Any) -> Any:
        if self._requests == len(self._compiled):
            self._compiled.append(self._compile(step))
        self._requests += 1
        return self._compiled[self._requests - 1]


def part_of_progress(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Return a callback for part ``number`` of ``count`` that reports progress over all parts."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


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
