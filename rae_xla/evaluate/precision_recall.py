"""Precision and recall of generated images (Kynkäänniemi et al. 2019).

The protocol is that of the ADM suite (Dhariwal and Nichol 2021). A set covers the balls around the
features of its images; each ball reaches to the third-nearest other image of the set. The suite
computes distances in half precision; here they are float64, so that the result depends neither on
the machine nor on the block size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.evaluate.host_values import all_gather_values
from rae_xla.runtime import Backend

NEIGHBOURS = 3
ROWS, COLUMNS = 1000, 8000
"""Size of a block of distances: 64 MB."""


def precision_recall(
    reference: Tensor,
    samples: Tensor,
    backend: Backend,
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Return the share of samples that the reference covers, and vice versa.

    All processes must call this; they share the work and all get the result.

    Args:
        reference: features (N, D) on the host, the same in every process.
        samples: features (M, D) on the host, the same in every process.
        backend: its GPU computes the distances if it has one; otherwise the host does.
        on_progress: called after every row of blocks.

    Returns:
        Precision and recall.

    Raises:
        UserError: if a set has fewer than four images.
    """
    for features, what in ((reference, "the reference"), (samples, "the samples")):
        if len(features) <= NEIGHBOURS:
            raise UserError(
                f"precision and recall of {len(features)} images in {what}: at least "
                f"{NEIGHBOURS + 1} are needed, for {NEIGHBOURS} neighbours each, and thousands for "
                "a meaningful value"
            )
    device = _distance_device(backend)
    reference_radii = _squared_radii(reference, backend, device, on_progress).to(device)
    sample_radii = _squared_radii(samples, backend, device, on_progress).to(device)
    in_reference = torch.zeros(len(samples), dtype=torch.float64)
    in_samples = torch.zeros(len(reference), dtype=torch.float64)
    for rows in _local_blocks(len(samples), backend):
        row_features = samples[rows].to(device)
        for columns in _blocks(len(reference), COLUMNS):
            distances = _squared_distances(row_features, reference[columns].to(device))
            covered = (distances <= reference_radii[columns]).any(1).cpu()
            covering = (distances <= sample_radii[rows, None]).any(0).cpu()
            in_reference[rows] = torch.maximum(in_reference[rows], covered.double())
            in_samples[columns] = torch.maximum(in_samples[columns], covering.double())
        on_progress()
    precision = all_gather_values(backend, in_reference).amax(0).mean()
    recall = all_gather_values(backend, in_samples).amax(0).mean()
    return precision.item(), recall.item()


def _distance_device(backend: Backend) -> torch.device:
    """Return the backend's device, or the CPU where float64 is missing (MPS) or slow (TPU)."""
    return torch.device("cpu") if backend.device.type in ("mps", "xla") else backend.device


def _squared_radii(
    features: Tensor, backend: Backend, device: torch.device, on_progress: Callable[[], None]
) -> Tensor:
    """Return the squared distance (N,) of each row to its third-nearest other row."""
    radii = torch.zeros(len(features), dtype=torch.float64)
    for rows in _local_blocks(len(features), backend):
        row_features = features[rows].to(device)
        # one more than the neighbours, because each row is its own nearest
        nearest = torch.full((len(row_features), NEIGHBOURS + 1), torch.inf, device=device).double()
        for columns in _blocks(len(features), COLUMNS):
            distances = _squared_distances(row_features, features[columns].to(device))
            candidates = torch.cat([nearest, distances], 1)
            nearest = candidates.topk(NEIGHBOURS + 1, largest=False).values
        radii[rows] = nearest[:, NEIGHBOURS].cpu()
        on_progress()
    return all_gather_values(backend, radii).amax(0)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    a, b = first.double(), second.double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _local_blocks(count: int, backend: Backend) -> Iterator[slice]:
    """Return the rows of blocks that this process computes, one in ``process_count``."""
    blocks = list(_blocks(count, ROWS))
    return iter(blocks[backend.process_index :: backend.process_count])
