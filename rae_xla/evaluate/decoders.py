"""Comparison of decoders: gFID of the same latents through several decoders, and mutual PSNR."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import rae_xla.interop  # noqa: F401  so that checkpoints and results folders can be opened
from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, on_devices
from rae_xla.evaluate.feature_networks import FeatureNetwork
from rae_xla.evaluate.frechet import MomentStream, frechet_distance
from rae_xla.evaluate.image_metrics import psnr
from rae_xla.evaluate.references import Reference
from rae_xla.models.pretrained.weight_files import open_weights_source
from rae_xla.models.rae import RAE
from rae_xla.models.weights import load_strict
from rae_xla.progress import progress_bar
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import Pixels, to_grid, to_pixels
from rae_xla.sample.reconstruct import with_decoder
from rae_xla.sample.rows import collect_rows_later, in_flight
from rae_xla.sample.sampler import Latents

GRID_COLUMNS = 10
"""Latents that the grid shows, from the first."""


@dataclass(frozen=True)
class DecoderResult:
    """Metrics of one decoder.

    Attributes:
        name: name in the table.
        path: its weight file.
        fid: gFID against the reference; None if it was not requested.
        psnr_to_first: mean PSNR in dB of its images against those of the first decoder; 100 for
            equal images.
    """

    name: str
    path: str
    fid: float | None
    psnr_to_first: float


@dataclass(frozen=True)
class DecoderReport:
    """Comparison of several decoders.

    Attributes:
        results: one per decoder, in the order given.
        num_images: number of latents.
        image_size: side of an image, in pixels.
        reference: what gFID compared with; None if it was not requested.
        grid: (H, W, 3) images of the first latents, a row per decoder.
        warnings: what limits the interpretation of the metrics.
    """

    results: tuple[DecoderResult, ...]
    num_images: int
    image_size: int
    reference: Reference | None
    grid: Pixels
    warnings: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the content of a JSON report."""
        return {
            "decoders": [vars(result) for result in self.results],
            "num_images": self.num_images,
            "image_size": self.image_size,
            "reference": self.reference.describe() if self.reference else None,
            "warnings": list(self.warnings),
        }


def open_latents(path: Path, rae: RAE) -> Latents:
    """Open the latents that ``rae-xla sample --keep-latents`` wrote, memory-mapped.

    Args:
        path: the ``.npy`` file.
        rae: the autoencoder whose latents they must be.

    Returns:
        (N, C, h, w) float32.

    Raises:
        UserError: if the file is missing, its shape does not match, or rows are missing.
    """
    if not path.is_file():
        raise UserError(
            f"--latents {path}: there is no such file; `rae-xla sample ... --keep-latents` writes "
            "latents.npy next to its images"
        )
    try:
        latents: Latents = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"--latents {path} is not a readable .npy file: {error}") from error
    if isinstance(latents, np.lib.npyio.NpzFile):
        raise UserError(f"--latents {path} is an .npz file; give the .npy file of the latents")
    shape = (len(latents) if latents.ndim else 0, *rae.latent_size)
    if latents.dtype != np.float32 or latents.shape != shape or not len(latents):
        raise UserError(
            f"--latents {path}: {latents.dtype} {latents.shape}; this autoencoder decodes float32 "
            f"(N, {', '.join(map(str, rae.latent_size))}): give the configuration that the set was "
            "sampled with"
        )
    for row in range(len(latents)):
        # One channel is enough to recognise a row of zeros; a set may have 40 GB.
        if not latents[row, 0].any():
            raise UserError(
                f"--latents {path}: row {row} of {len(latents)} was never written; repeat the "
                "`rae-xla sample` command, which generates what is missing"
            )
    return latents


def load_decoders(rae: RAE, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Load decoders from weight files, on the host.

    Args:
        rae: an autoencoder whose decoder has the same architecture.
        paths: weight files of decoders or complete autoencoders, checkpoints, or results folders;
            of a training checkpoint, the averaged weights.

    Returns:
        The decoders by name: the file's stem, or its path if two files have the same stem.

    Raises:
        UserError: if a file is missing or is not a decoder of this architecture.
    """
    stems = [Path(path).stem for path in paths]
    ambiguous = len(set(stems)) < len(stems)
    decoders: dict[str, nn.Module] = {}
    for path, stem in zip(paths, stems, strict=True):
        decoder = copy.deepcopy(rae.decoder)
        try:
            content = open_weights_source(path, part="decoder")
            load_strict(decoder, content.state, str(path))
        except UserError as error:
            raise UserError(f"--decoders: {error}") from None
        name = str(path) if ambiguous else stem
        if name in decoders:
            raise UserError(f"--decoders: {path} is given twice")
        decoders[name] = decoder.requires_grad_(False)
    return decoders


def compare_decoders(
    rae: RAE,
    backend: Backend,
    latents: Latents,
    decoders: Mapping[str, nn.Module],
    paths: Sequence[str],
    *,
    features: FeatureNetwork | None,
    reference: Reference | None,
) -> DecoderReport:
    """Decode latents with several decoders and compare the images.

    Pixels are truncated to 8 bits, as in the sample sets that the latents come from.

    Args:
        rae: the autoencoder, placed; its latent statistics are used, its decoder is not.
        backend: where it is placed.
        latents: (N, C, h, w) float32, normalised, as ``RAE.decode`` takes them.
        decoders: decoders by name, placed; all are on the devices at the same time.
        paths: weight files of the decoders, for the report.
        features: the Inception network for gFID; None without gFID.
        reference: what gFID compares with; None without gFID.
    """
    names = list(decoders)
    decode = {n: _decode_function(with_decoder(rae, d), backend) for n, d in decoders.items()}
    moments = {name: MomentStream() for name in names}
    ratios: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    shown: dict[str, list[Pixels]] = {name: [] for name in names}
    rows = chunk_rows(backend)
    parts = (latents[start : start + rows] for start in range(0, len(latents), rows))
    total = -(-len(latents) // rows)
    quiet = backend.process_index != 0

    def start() -> Iterator[Callable[[], dict[str, Batch]]]:
        chunks = on_devices(backend, parts)
        for _, chunk in progress_bar(chunks, total=total, unit="chunk", disable=quiet):
            outputs: dict[str, Batch] = {n: {"pixels": decode[n](chunk["rows"])} for n in names}
            if features is not None:
                for output in outputs.values():
                    output["features"] = features(output["pixels"])
            copies = {n: collect_rows_later(backend, chunk, outputs[n]) for n in names}
            yield partial(_wait_for, copies)

    for first_row, fetched in zip(range(0, len(latents), rows), in_flight(start()), strict=True):
        count = min(rows, len(latents) - first_row)
        first = fetched[names[0]]["pixels"][:count].numpy()
        for name in names:
            pixels = fetched[name]["pixels"][:count].numpy()
            ratios[name].append(psnr(first, pixels))
            if features is not None:
                moments[name].add(fetched[name]["features"][:count])
            shown[name] += list(pixels[: max(0, GRID_COLUMNS - first_row)])
    fids: dict[str, float | None] = dict.fromkeys(names)
    warning = None
    if features is not None and reference is not None:
        assert reference.gaussian is not None
        for name in names:
            gaussian = moments[name].moments().gaussian("the decoded latents")
            fids[name] = frechet_distance(gaussian, reference.gaussian)
        warning = reference.warning(len(latents))
    return DecoderReport(
        results=tuple(
            DecoderResult(name, str(path), fids[name], float(np.concatenate(ratios[name]).mean()))
            for name, path in zip(names, paths, strict=True)
        ),
        num_images=len(latents),
        image_size=rae.image_size,
        reference=reference,
        grid=_grid(shown),
        warnings=(warning,) if warning else (),
    )


def _wait_for(copies: Mapping[str, Callable[[], Batch]]) -> dict[str, Batch]:
    return {name: wait() for name, wait in copies.items()}


def _decode_function(rae: RAE, backend: Backend) -> Callable[[Tensor], Tensor]:
    """Return a compiled function: latents (B, C, h, w) to images (B, 3, H, W) uint8."""

    @backend.compile
    def decode(latents: Tensor) -> Tensor:
        with torch.no_grad(), backend.autocast():
            return to_pixels(rae.decode(latents)).permute(0, 3, 1, 2).contiguous()

    return decode


def _grid(shown: Mapping[str, list[Pixels]]) -> Pixels:
    images = [image.transpose(1, 2, 0) for row in shown.values() for image in row]
    columns = len(next(iter(shown.values())))
    return to_grid(np.stack(images), columns, captions=list(shown))
