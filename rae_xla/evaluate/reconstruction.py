"""Metrics of reconstructions: PSNR, SSIM, LPIPS and rFID.

The metrics compare images as they would be saved: reconstructions are clamped and rounded to 8
bits. Every image counts once, whatever the batch size and the number of devices: each device always
works on the same number of rows (see ``chunks``), the padding of the last chunk is ignored, and
sums are float64 in the order of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_xla.config.validation import RECON_METRICS
from rae_xla.data.loader import one_pass
from rae_xla.data.shards.index import ShardIndex
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, local_rows
from rae_xla.evaluate.feature_networks import FeatureNetwork
from rae_xla.evaluate.frechet import MomentStream, frechet_distance
from rae_xla.evaluate.host_values import all_gather_values
from rae_xla.evaluate.image_metrics import Values, psnr, ssim
from rae_xla.evaluate.image_sets import first_images
from rae_xla.evaluate.references import Reference, shard_reference
from rae_xla.models.lpips import LPIPS
from rae_xla.models.rae import RAE
from rae_xla.progress import progress_bar
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import Pixels, to_pixels, to_unit
from rae_xla.sample.rows import collect_rows, send_rows

UNITS = {"psnr": "dB"}
HOST_METRICS: dict[str, Callable[[Pixels, Pixels], Values]] = {"psnr": psnr, "ssim": ssim}


@dataclass(frozen=True)
class _Chunk:
    """A chunk that the devices work on.

    Attributes:
        images: this process's rows of the originals, on the host.
        sent: all rows on the devices, with their positions.
        outputs: of all rows, on the devices.
    """

    images: Tensor
    sent: Batch
    outputs: Batch


@dataclass(frozen=True)
class ReconReport:
    """Metrics of reconstructions.

    Attributes:
        metrics: values by name; PSNR in dB.
        num_images: number of images.
        image_size: side of an image, in pixels.
        images: the images that were reconstructed.
        reference: what rFID compared with; None without rFID. Pass it to the next evaluation, so
            that the originals are not measured again.
        warnings: what limits the interpretation of the metrics.
    """

    metrics: dict[str, float]
    num_images: int
    image_size: int
    images: Reference
    reference: Reference | None
    warnings: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the content of a JSON report."""
        return {
            "metrics": {
                name: {"value": value, "unit": UNITS.get(name), "images": self.num_images}
                for name, value in self.metrics.items()
            },
            "num_images": self.num_images,
            "image_size": self.image_size,
            "images": self.images.describe(),
            "reference": self.reference.describe() if self.reference else None,
            "warnings": list(self.warnings),
        }


def evaluate_reconstruction(
    rae: RAE,
    backend: Backend,
    index: ShardIndex,
    *,
    metrics: Sequence[str] = RECON_METRICS,
    num_images: int | None = None,
    batch_size: int = 64,
    lpips: LPIPS | None = None,
    features: FeatureNetwork | None = None,
    reference: Reference | None = None,
    num_workers: int = 0,
    progress: bool = False,
    on_progress: Callable[[], None] | None = None,
) -> ReconReport:
    """Reconstruct the first images of a data set and compute metrics.

    All processes of a run must call this, and all get the report. Another call with the same
    networks compiles nothing new.

    Args:
        rae: the autoencoder, placed; evaluated in eval mode, then returned to its mode.
        backend: where it is placed.
        index: the images, which are centre-cropped to ``rae.image_size``.
        metrics: any of ``RECON_METRICS``.
        num_images: number of images, from the first; None for all.
        batch_size: images in flight, rounded up to complete chunks; it does not change a metric.
        lpips: the LPIPS network, placed; required for ``lpips``.
        features: the Inception network; required for ``rfid``.
        reference: what rFID compares with (from ``load_fid_reference``, or an earlier report); None
            for the originals.
        num_workers: processes that decode images.
        progress: show a progress bar.
        on_progress: called after every group of images.

    Raises:
        UserError: if a metric is unknown, there are too few images, or ``rfid`` is requested of a
            single image.
    """
    index = first_images(index, num_images)
    _check(metrics, len(index), batch_size)
    assert lpips is not None or "lpips" not in metrics, "lpips needs its network"
    assert features is not None or "rfid" not in metrics, "rfid needs its network"
    images = shard_reference(index)
    if reference is None or (reference.kind == "originals" and reference.sha256 != images.sha256):
        reference = images
    host_metrics = [name for name in metrics if name in HOST_METRICS]
    accumulator = _MetricAccumulator(backend, len(index), host_metrics)
    start = _chunk_function(
        rae,
        backend,
        lpips=lpips if "lpips" in metrics else None,
        features=features if "rfid" in metrics else None,
        measure_originals=reference.gaussian is None,
    )
    rows = chunk_rows(backend)
    chunks = one_pass(
        index,
        batch_size=rows,
        transform=CenterCrop(rae.image_size),
        process_index=backend.process_index,
        process_count=backend.process_count,
        num_workers=num_workers,
    )
    groups = _groups(chunks, -(-batch_size // rows))
    total = -(-len(index) // rows)
    with _eval_mode(rae), progress_bar(total=total, unit="chunk", disable=not progress) as bar:
        running: list[_Chunk] = []
        for group in chain(groups, [[]]):
            done = [(c.images, collect_rows(backend, c.sent, c.outputs)) for c in running]
            running = [start(host["image"]) for host in group]
            # The devices work on this group while the host measures the previous one.
            for images_of_process, outputs in done:
                accumulator.add(images_of_process, outputs)
            bar.update(len(done))
            if on_progress is not None:
                on_progress()
    values = accumulator.means()
    warnings = accumulator.warnings()
    if "rfid" in metrics:
        if reference.gaussian is None:
            reference = images.with_gaussian(
                accumulator.moments["original_features"].moments().gaussian(f"{images}")
            )
        assert reference.gaussian is not None
        gaussian = accumulator.moments["features"].moments().gaussian("the reconstructions")
        values["rfid"] = frechet_distance(gaussian, reference.gaussian)
        if warning := reference.warning(len(index)):
            warnings.append(warning)
    return ReconReport(
        metrics={name: values[name] for name in metrics},
        num_images=len(index),
        image_size=rae.image_size,
        images=images,
        reference=reference if "rfid" in metrics else None,
        warnings=tuple(warnings),
    )


def _check(metrics: Sequence[str], count: int, batch_size: int) -> None:
    """Check the arguments of an evaluation.

    Raises:
        UserError: if one is invalid.
    """
    unknown = [name for name in metrics if name not in RECON_METRICS]
    if unknown or not metrics:
        raise UserError(
            f"metrics: {', '.join(unknown) or 'none given'}; known are {', '.join(RECON_METRICS)}"
        )
    if "rfid" in metrics and count < 2:
        raise UserError(
            "rfid of a single image: a covariance needs at least two (and a meaningful rFID "
            "thousands); give more images, or omit rfid from --metrics"
        )
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}: give 1 or more")


def _chunk_function(
    rae: RAE,
    backend: Backend,
    *,
    lpips: LPIPS | None,
    features: FeatureNetwork | None,
    measure_originals: bool,
) -> Callable[[Tensor], _Chunk]:
    """Return a function that starts the work on this process's images of one chunk.

    There are three compiled functions rather than one, so that the reconstructions do not depend on
    the metrics, and the same graph computes the features of originals and reconstructions.
    """

    @backend.compile
    def reconstruct(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), backend.autocast():
            images = rae(to_unit(pixels))
        rounded = to_pixels(images, rounding=True).permute(0, 3, 1, 2)
        return rounded.contiguous(), torch.isfinite(images).flatten(1).all(1)

    @backend.compile
    def compare(first: Tensor, second: Tensor) -> Tensor:
        assert lpips is not None
        with torch.no_grad():
            return lpips(to_unit(first) * 2 - 1, to_unit(second) * 2 - 1)

    def start(images: Tensor) -> _Chunk:
        sent = send_rows(backend, {"pixels": images}, local_rows(backend).start)
        pixels = sent["pixels"]
        reconstructions, finite = reconstruct(pixels)
        results = {"reconstructions": reconstructions, "finite": finite}
        if lpips is not None:
            with backend.full_float32():
                results["lpips"] = compare(pixels, reconstructions)
        if features is not None:
            results["features"] = features(reconstructions)
            if measure_originals:
                results["original_features"] = features(pixels)
        return _Chunk(images, sent, results)

    return start


@dataclass
class _MetricAccumulator:
    """Accumulates metrics and moments of images that arrive in order, chunk by chunk.

    Attributes:
        backend: where the chunks were computed.
        count: number of images in total.
        host_metrics: names of the ``HOST_METRICS`` to compute.
        seen: number of images so far.
        not_finite: number of reconstructions with values that are not finite.
        local_values: host metrics of this process's rows, by name, one array per chunk.
        distances: LPIPS of all rows, one array per chunk.
        moments: moments of ``features`` and ``original_features``.
    """

    backend: Backend
    count: int
    host_metrics: list[str]
    seen: int = 0
    not_finite: int = 0
    local_values: dict[str, list[Values]] = field(default_factory=dict)
    distances: list[Values] = field(default_factory=list)
    moments: dict[str, MomentStream] = field(default_factory=dict)

    def add(self, images: Tensor, outputs: Batch) -> None:
        """Add one chunk.

        Args:
            images: this process's rows of the originals.
            outputs: the outputs of all rows, on the host, in the order of the images.
        """
        rows = min(chunk_rows(self.backend), self.count - self.seen)
        self.seen += rows
        self.not_finite += int((~outputs["finite"][:rows]).sum())
        for name in ("features", "original_features"):
            if name in outputs:
                self.moments.setdefault(name, MomentStream()).add(outputs[name][:rows])
        if "lpips" in outputs:
            self.distances.append(outputs["lpips"][:rows].double().numpy())
        if self.host_metrics:
            own = local_rows(self.backend)
            first, second = images.numpy(), outputs["reconstructions"][own].numpy()
            real = max(0, min(rows - own.start, len(first)))
            for name in self.host_metrics:
                values = np.zeros(len(first))
                values[:real] = HOST_METRICS[name](first[:real], second[:real])
                self.local_values.setdefault(name, []).append(values)

    def means(self) -> dict[str, float]:
        """Return the means over the images of all processes."""
        means = {
            name: float(_all_gather(self.backend, values)[: self.count].mean())
            for name, values in self.local_values.items()
        }
        if self.distances:
            means["lpips"] = float(np.concatenate(self.distances).mean())
        return means

    def warnings(self) -> list[str]:
        """Return a warning if reconstructions have values that are not finite."""
        if not self.not_finite:
            return []
        return [
            f"{self.not_finite} of {self.count} reconstructions have values that are not finite "
            "(NaN or infinite), which count as black or white pixels: check the weights and the "
            "precision"
        ]


def _all_gather(backend: Backend, chunks: list[Values]) -> Values:
    """Return the values of all processes, in the order of the images."""
    values = all_gather_values(backend, torch.from_numpy(np.concatenate(chunks)))
    in_order = values.reshape(backend.process_count, len(chunks), -1).transpose(0, 1)
    return in_order.flatten().numpy()


def _groups(chunks: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    while group := list(islice(chunks, size)):
        yield group


@contextmanager
def _eval_mode(rae: RAE) -> Iterator[None]:
    training = rae.training
    rae.eval()
    try:
        yield
    finally:
        rae.train(training)
