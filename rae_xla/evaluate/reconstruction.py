"""How well an autoencoder reconstructs: PSNR, SSIM, LPIPS and rFID of exactly N images.

What is compared are the pictures that would be saved: the reconstruction clamped and rounded to 8
bits. Every image counts once, whatever the batch size and the number of devices: each device always
works on the same number of rows (see ``chunks``), rows that only fill up the last chunk are left
out, and sums are in float64 in the order of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rae_xla.config.check import RECON_METRICS
from rae_xla.data.index import ShardIndex
from rae_xla.data.stream import one_pass
from rae_xla.data.transforms import CenterCrop
from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, own_rows
from rae_xla.evaluate.frechet import MomentStream, frechet_distance
from rae_xla.evaluate.image_metrics import Values, psnr, ssim
from rae_xla.evaluate.inception import FeatureNetwork
from rae_xla.evaluate.reference import Reference, originals
from rae_xla.models.lpips import LPIPS
from rae_xla.models.rae import RAE
from rae_xla.progress import progress_bar
from rae_xla.runtime import Batch, Runtime
from rae_xla.sample.pictures import Pixels, to_pixels, to_unit

UNITS = {"psnr": "dB"}
ON_HOST: dict[str, Callable[[Pixels, Pixels], Values]] = {"psnr": psnr, "ssim": ssim}

Chunk = tuple[Batch, Batch]
"""A chunk's images on the host (this process's rows) and what the devices made of the chunk."""


@dataclass(frozen=True)
class ReconReport:
    """What was measured, over what, against what."""

    metrics: dict[str, float]
    """By name; PSNR in dB."""
    num_images: int
    image_size: int
    images: Reference
    """The images that were reconstructed."""
    reference: Reference | None
    """What rFID compared with; pass it on to the next evaluation, and originals are not measured
    again."""
    warnings: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """For a JSON file."""
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
    runtime: Runtime,
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
    moved: Callable[[], None] | None = None,
) -> ReconReport:
    """Reconstruct the first images of a data set and measure them.

    Every process of a run calls it and every process gets the report. Called again with the same
    networks it compiles nothing new.

    Args:
        rae: placed; evaluated in eval mode, left in the mode it was in.
        runtime: where it is.
        index: the images, cut to ``rae.image_size`` in the middle.
        metrics: any of ``RECON_METRICS``.
        num_images: how many, from the first; None for all.
        batch_size: images under way at a time, rounded up to whole chunks; no result depends on it.
        lpips: placed; needed for ``lpips``.
        features: needed for ``rfid``.
        reference: what rFID compares with (from ``load_reference``, or an earlier report's); None
            for the images themselves.
        num_workers: processes that decode images.
        progress: show a bar.
        moved: called after every group of images.

    Raises:
        UserError: an unknown metric, more images than there are, or one image with ``rfid``.
    """
    index = first_images(index, num_images)
    _check(metrics, len(index), batch_size)
    assert lpips is not None or "lpips" not in metrics, "lpips needs its network"
    assert features is not None or "rfid" not in metrics, "rfid needs its network"
    images = originals(index)
    if reference is None or (reference.kind == "originals" and reference.sha256 != images.sha256):
        reference = images
    measured = _Measured(runtime, len(index), [name for name in metrics if name in ON_HOST])
    start = _chunk_on_devices(
        rae,
        runtime,
        lpips=lpips if "lpips" in metrics else None,
        features=features if "rfid" in metrics else None,
        originals_too=reference.gaussian is None,
    )
    rows = chunk_rows(runtime)
    chunks = one_pass(
        index,
        batch_size=rows,
        transform=CenterCrop(rae.image_size),
        process_index=runtime.process_index,
        process_count=runtime.process_count,
        num_workers=num_workers,
    )
    groups = _groups(chunks, -(-batch_size // rows))
    total = -(-len(index) // rows)
    with _eval_mode(rae), progress_bar(total=total, unit="chunk", disable=not progress) as bar:
        running: list[Chunk] = []
        for group in chain(groups, [[]]):
            done = [(host, runtime.to_host(made)) for host, made in running]
            running = [(host, start(host)) for host in group]
            # the devices work on this group while the host measures the one before it
            for host, made in done:
                measured.add(host["image"], made)
            bar.update(len(done))
            if moved is not None:
                moved()
    values = measured.means()
    warnings = measured.warnings()
    if "rfid" in metrics:
        if reference.gaussian is None:
            reference = images.with_gaussian(
                measured.moments["original_features"].moments().gaussian(f"{images}")
            )
        assert reference.gaussian is not None
        ours = measured.moments["features"].moments().gaussian("the reconstructions")
        values["rfid"] = frechet_distance(ours, reference.gaussian)
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


def first_images(index: ShardIndex, count: int | None, option: str = "--num-images ") -> ShardIndex:
    """The index of the first ``count`` images alone; ``option`` is how a user gives the count.

    Raises:
        UserError: if there are fewer.
    """
    if count is None:
        return index
    if not 1 <= count <= len(index):
        raise UserError(
            f"{count} images cannot be had from {index.folder}, which holds {len(index)}: give "
            f"{option}1 to {len(index)}, or leave it out for all"
        )
    return replace(index, samples=index.samples[:count])


def _check(metrics: Sequence[str], count: int, batch_size: int) -> None:
    unknown = [name for name in metrics if name not in RECON_METRICS]
    if unknown or not metrics:
        raise UserError(
            f"metrics: {', '.join(unknown) or 'none given'}; there are {', '.join(RECON_METRICS)}"
        )
    if "rfid" in metrics and count < 2:
        raise UserError(
            "rfid of a single image: a covariance needs two at least (and rFID thousands to mean "
            "anything); give more images, or leave rfid out of --metrics"
        )
    if batch_size < 1:
        raise UserError(f"a batch of {batch_size} images: give 1 at least")


def _chunk_on_devices(
    rae: RAE,
    runtime: Runtime,
    *,
    lpips: LPIPS | None,
    features: FeatureNetwork | None,
    originals_too: bool,
) -> Callable[[Batch], Batch]:
    """A function that starts the work on one chunk.

    Three compiled functions rather than one: the pictures are the same whichever metrics are asked
    for, and the features of originals and reconstructions come from one graph.
    """

    @runtime.compile
    def reconstruct(pixels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), runtime.autocast():
            made = rae(to_unit(pixels))
        rounded = to_pixels(made, rounding=True).permute(0, 3, 1, 2)
        return rounded.contiguous(), torch.isfinite(made).flatten(1).all(1)

    @runtime.compile
    def compare(first: Tensor, second: Tensor) -> Tensor:
        assert lpips is not None
        with torch.no_grad():
            return lpips(to_unit(first) * 2 - 1, to_unit(second) * 2 - 1)

    def start(host: Batch) -> Batch:
        pixels = runtime.put({"image": host["image"]})["image"]
        made, finite = reconstruct(pixels)
        results = {"made": made, "finite": finite}
        if lpips is not None:
            results["lpips"] = compare(pixels, made)
        if features is not None:
            results["features"] = features(made)
            if originals_too:
                results["original_features"] = features(pixels)
        return results

    return start


@dataclass
class _Measured:
    """What is known of the images so far; they come in order."""

    runtime: Runtime
    count: int
    on_host: list[str]
    seen: int = 0
    broken: int = 0
    own: dict[str, list[Values]] = field(default_factory=dict)
    distances: list[Values] = field(default_factory=list)
    moments: dict[str, MomentStream] = field(default_factory=dict)

    def add(self, images: Tensor, made: Batch) -> None:
        """One chunk: this process's images, and what the devices made of all of it."""
        rows = min(chunk_rows(self.runtime), self.count - self.seen)
        self.seen += rows
        self.broken += int((~made["finite"][:rows]).sum())
        for name in ("features", "original_features"):
            if name in made:
                self.moments.setdefault(name, MomentStream()).add(made[name][:rows])
        if "lpips" in made:
            self.distances.append(made["lpips"][:rows].double().numpy())
        if self.on_host:
            own = own_rows(self.runtime)
            first, second = images.numpy(), made["made"][own].numpy()
            real = max(0, min(rows - own.start, len(first)))
            for name in self.on_host:
                found = np.zeros(len(first))
                found[:real] = ON_HOST[name](first[:real], second[:real])
                self.own.setdefault(name, []).append(found)

    def means(self) -> dict[str, float]:
        """The mean over all images, of every process."""
        means = {name: float(_of_all(self.runtime, v)[: self.count].mean()) for name, v in
                 self.own.items()}  # fmt: skip
        if self.distances:
            means["lpips"] = float(np.concatenate(self.distances).mean())
        return means

    def warnings(self) -> list[str]:
        """What a reader of the numbers must know."""
        if not self.broken:
            return []
        return [
            f"{self.broken} of {self.count} reconstructions have values that are not finite (NaN "
            "or infinite), counted as black or white pixels: the weights or the precision are wrong"
        ]


def _of_all(runtime: Runtime, chunks: list[Values]) -> Values:
    """The values of every process, in the order of the images.

    Sent as integers: whatever a device does to float64, it leaves the bits of int32 alone.
    """
    own = torch.from_numpy(np.concatenate(chunks))
    bits = own.view(torch.int32).reshape(-1, 2)
    whole = runtime.to_host(runtime.put({"bits": bits}))["bits"]
    values = whole.contiguous().view(torch.float64).reshape(runtime.process_count, len(chunks), -1)
    return values.transpose(0, 1).flatten().numpy()


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
