"""From labels to pictures: noise, the sampler with its guidance, the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.interop.belonging import check_dit_file
from rae_xla.models.rae import RAE
from rae_xla.registry import instantiate
from rae_xla.runtime import Batch, Runtime
from rae_xla.runtime.random import Draws
from rae_xla.sample.pictures import Pixels, pad_rows, to_pixels
from rae_xla.sample.rows import collect_rows, rows_per_device, share_rows
from rae_xla.transport import create_transport, guided

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.transport.guidance import Guided

Progress = Callable[[int, int], None]
# (index of the step, a tensor of the wanted shape and device) -> standard normal draws
StepNoise = Callable[[int, Tensor], Tensor]
Latents = NDArray[np.float32]


@dataclass(frozen=True)
class Drawn:
    """Pictures that this process has drawn.

    Attributes:
        rows: (B,) the pictures' numbers.
        pixels: (B, H, W, 3).
        latents: (B, C, h, w) normalised, as they were decoded; None if they were not asked for.
    """

    rows: NDArray[np.int32]
    pixels: Pixels
    latents: Latents | None


class ImageSampler:
    """Draws pictures from a diffusion transformer in the latent space of an RAE.

    Picture ``i`` of a seed has noise of its own, so the batches it is drawn in, and the devices,
    change it by no more than rounding; on CPUs, where every device is given equally many rows
    whatever the batch (``rows.rows_per_device``), by nothing.
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
        self._guided: Guided | None = None
        self._steps = _CompiledSteps(runtime.compile)
        self._decode = runtime.compile(self._to_pixels)
        self._draws: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}

    @property
    def runtime(self) -> Runtime:
        """Where it draws; all its processes draw together."""
        return self._runtime

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of one picture's latents."""
        return self._shape

    def rows_per_device(self, batch: int) -> int:
        """How many pictures a device draws together when ``batch`` are asked for."""
        return rows_per_device(self._runtime, batch, tokens=self._shape[1] * self._shape[2])

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
        return self._collect(seed, rows, labels, progress, keep_latents=False)["pixels"].numpy()

    def with_latents(self, seed: int, rows: Tensor, labels: Tensor) -> tuple[Pixels, Latents]:
        """Draw one batch; also its latents (B, C, h, w) float32, normalised, as they were decoded.

        The pictures are those of a plain call.
        """
        drawn = self._collect(seed, rows, labels, None, keep_latents=True)
        return drawn["pixels"].numpy(), drawn["latents"].float().numpy()

    def begin(
        self,
        seed: int,
        rows: Tensor,
        labels: Tensor,
        wanted: Tensor,
        *,
        keep_latents: bool = False,
    ) -> Callable[[], Drawn]:
        """Ask the devices for one batch, in which every process has a part, without waiting.

        Args:
            seed: of the whole set.
            rows: (B,) int32 on the host, the same in every process; B is ``rows_per_device`` for
                each part of the batch, or less, which is filled up.
            labels: (B,) int64 on the host.
            wanted: (B,) bool on the host; other rows only fill up.
            keep_latents: give them too.

        Returns:
            A function that waits and gives this process's part.
        """
        batch = self._share(rows, labels, wanted=wanted)
        latents = self._latents(seed, batch, None)
        with self._runtime.beside([latents, *batch.values()]):
            results = {"pixels": self._decode(latents)}
            results |= {name: batch[name] for name in ("rows", "wanted")}
            results |= {"latents": latents} if keep_latents else {}
            copies = self._runtime.own_rows(results)

        def wait() -> Drawn:
            own = copies()
            kept = own["wanted"].bool()
            return Drawn(
                own["rows"][kept].numpy(),
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
        """Latents (B, C, h, w), normalised, of noise alike and labels (B,), all on the devices.

        Args:
            noise: standard normal.
            labels: int64.
            step_noise: normal draws of the steps of an SDE.
            progress: called with (solver steps done, solver steps in all).
        """
        for module in (self._rae, self._model, self._guide):
            if module is not None:
                module.eval()
        if self._guided is None:
            self._guided = self._guide_by(labels)
        self._guided.y = labels
        self._steps.start_again()
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
                with self._runtime.autocast():
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
        with torch.no_grad(), self._runtime.autocast():
            return to_pixels(self._rae.decode(latents))

    def _share(self, rows: Tensor, labels: Tensor, **more: Tensor) -> Batch:
        return share_rows(self._runtime, {"rows": rows, "labels": labels, **more})

    @torch.no_grad()
    def _latents(self, seed: int, batch: Batch, progress: Progress | None) -> Tensor:
        def draws_of(step: int) -> Tensor:
            placed = self._runtime.put({"step": torch.tensor(step).int()})
            return self._normal(seed)(batch["rows"], placed["step"])

        return self.denoise(
            draws_of(0), batch["labels"], lambda step, _: draws_of(step + 1), progress
        )

    def _normal(self, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
        if seed not in self._draws:

            def normal(rows: Tensor, step: Tensor) -> Tensor:
                return Draws(seed, step, rows).normal("sampling noise", self._shape)

            self._draws[seed] = self._runtime.compile(normal)
        return self._draws[seed]

    def _collect(
        self,
        seed: int,
        rows: Tensor,
        labels: Tensor,
        progress: Progress | None,
        *,
        keep_latents: bool,
    ) -> dict[str, Tensor]:
        """Draw all rows, round by round, and give them to every process."""
        size = self.rows_per_device(len(rows)) * self._runtime.mesh.batch_parts
        rounds = list(zip(rows.split(size), labels.split(size), strict=True))
        made: list[dict[str, Tensor]] = []
        for number, (some, theirs) in enumerate(rounds):
            batch = self._share(pad_rows(some, size), pad_rows(theirs, size))
            latents = self._latents(seed, batch, _part(progress, number, len(rounds)))
            results = {"pixels": self._decode(latents)}
            results |= {"latents": latents} if keep_latents else {}
            whole = collect_rows(self._runtime, batch, results)
            made.append({name: tensor[: len(some)] for name, tensor in whole.items()})
        return {name: torch.cat([one[name] for one in made]) for name in made[0]}


class _CompiledSteps:
    """A ``compile_step`` that compiles for the first batch and gives the same to the others: for
    every batch the solver asks for the same steps in the same order.
    """

    def __init__(self, compile_step: Callable[[Any], Any]) -> None:
        self._compile, self._compiled, self._asked = compile_step, list[Any](), 0

    def start_again(self) -> None:
        """A new batch begins."""
        self._asked = 0

    def __call__(self, step: Any) -> Any:
        if self._asked == len(self._compiled):
            self._compiled.append(self._compile(step))
        self._asked += 1
        return self._compiled[self._asked - 1]


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Progress within one of several rounds, told as that of all."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


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
    check_dit_file(config.stage_2.ckpt, rae)
    if guide is not None and spec is not None:
        check_dit_file(spec.ckpt, rae)
    for module in (rae, model, guide):
        if module is not None:
            runtime.place(module.requires_grad_(False))
    return ImageSampler(config, runtime, rae, model, guide)
