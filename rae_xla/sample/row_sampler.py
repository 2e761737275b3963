"""Row sampler: from the rows of a batch to latents and images, on the devices of all processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rae_xla.models.rae import RAE
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.denoiser import Progress
from rae_xla.sample.images import Pixels, to_pixels
from rae_xla.sample.rows import collect_rows, pad_rows, rows_per_device, share_rows

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


class RowSampler(ABC):
    """Generates one image for each row of a batch.

    A row is a set of tensors, such as the label of a class or the tokens of a prompt, with
    ``indices``, the number of the image in the set. A subclass makes latents of them.

    Args:
        backend: of the models; all processes of it must sample together.
        rae: the autoencoder, placed; it decodes latents.
    """

    def __init__(self, backend: Backend, rae: RAE) -> None:
        self._backend, self._rae = backend, rae
        self._decode = backend.compile(self._to_pixels)

    @property
    def backend(self) -> Backend:
        """The backend that it runs on; all processes of it must sample together."""
        return self._backend

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of one image."""
        return self._rae.latent_size

    def rows_per_device(self, batch: int) -> int:
        """Return how many images each device generates together for a batch of ``batch``."""
        _, height, width = self.latent_size
        return rows_per_device(self._backend, batch, tokens=height * width)

    @abstractmethod
    def _sample_latents(self, seed: int, batch: Batch, progress: Progress | None) -> Tensor:
        """Return the latents (B, C, h, w) of a batch, as they are decoded."""

    def start_rows(
        self, seed: int, rows: Mapping[str, Tensor], wanted: Tensor, *, keep_latents: bool = False
    ) -> Callable[[], GeneratedBatch]:
        """Start one batch on the devices of all processes, without waiting for the result.

        Args:
            seed: seed of the sample set.
            rows: host tensors of B rows, the same in every process; B is at most
                ``rows_per_device`` times the number of batch shards, and smaller batches are
                padded.
            wanted: (B,) bool on the host; False marks padding, which is not returned.
            keep_latents: return the latents too.

        Returns:
            A function that waits for the devices and returns this process's share of the images.
        """
        batch = share_rows(self._backend, {**rows, "wanted": wanted})
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

    def generate_rows(
        self,
        seed: int,
        rows: Mapping[str, Tensor],
        progress: Progress | None = None,
        *,
        keep_latents: bool = False,
    ) -> dict[str, Tensor]:
        """Generate the images of all rows, round by round, and gather them on every process.

        Args:
            seed: seed of the images.
            rows: host tensors of B rows, the same in every process.
            progress: called after every solver step.
            keep_latents: return the latents too.

        Returns:
            ``pixels`` (B, H, W, 3) uint8, and ``latents`` (B, C, h, w) on request.
        """
        count = len(rows["indices"])
        size = self.rows_per_device(count) * self._backend.mesh.batch_shards
        starts = range(0, count, size)
        outputs: list[dict[str, Tensor]] = []
        for number, start in enumerate(starts):
            part = {name: pad_rows(t[start : start + size], size) for name, t in rows.items()}
            batch = share_rows(self._backend, part)
            latents = self._sample_latents(
                seed, batch, part_of_progress(progress, number, len(starts))
            )
            results = {"pixels": self._decode(latents)}
            results |= {"latents": latents} if keep_latents else {}
            gathered = collect_rows(self._backend, batch, results)
            outputs.append({name: t[: count - start] for name, t in gathered.items()})
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}

    def _to_pixels(self, latents: Tensor) -> Tensor:
        with torch.no_grad(), self._backend.autocast():
            return to_pixels(self._rae.decode(latents))


def part_of_progress(progress: Progress | None, number: int, count: int) -> Progress | None:
    """Return a callback for part ``number`` of ``count`` that reports progress over all parts."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)
