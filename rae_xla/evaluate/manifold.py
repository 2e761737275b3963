"""Precision and recall: which pictures lie where the other set has its own.

By the ADM suite's protocol (Dhariwal and Nichol 2021), which is the improved precision and recall
of Kynkäänniemi et al. (2019): a set covers the balls around its pictures' features that reach to
the third-nearest other one. The suite computes distances in half precision where they fit; here
they are float64, so that neither the machine nor the cut into blocks decides who is nearer.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.runtime import Runtime

NEIGHBOURS = 3
ROWS, COLUMNS = 1000, 8000
"""Of a block of distances: 64 MB."""


def precision_recall(
    reference: Tensor,
    samples: Tensor,
    runtime: Runtime,
    moved: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """The share of samples that the reference covers, and of the reference that the samples do.

    The processes of a run share the work; all must call it and all get the result.

    Args:
        reference: features (N, D) on the host, the same in every process.
        samples: features (M, D), likewise.
        runtime: whose GPU, if it has one, does the work; the host's cores otherwise.
        moved: called after every row of blocks.

    Raises:
        UserError: fewer than four pictures.
    """
    for features, what in ((reference, "the reference"), (samples, "the samples")):
        if len(features) <= NEIGHBOURS:
            raise UserError(
                f"precision and recall of {len(features)} pictures in {what}: with {NEIGHBOURS} "
                f"neighbours each, {NEIGHBOURS + 1} are needed at least, and thousands to mean "
                "anything"
            )
    device = runtime.device if runtime.device.type == "cuda" else torch.device("cpu")
    reference_radii = _radii(reference, runtime, device, moved).to(device)
    sample_radii = _radii(samples, runtime, device, moved).to(device)
    in_reference = torch.zeros(len(samples), dtype=torch.float64)
    in_samples = torch.zeros(len(reference), dtype=torch.float64)
    for rows in _own_blocks(len(samples), runtime):
        ours = samples[rows].to(device)
        for columns in _blocks(len(reference), COLUMNS):
            distances = _squared_distances(ours, reference[columns].to(device))
            covered = (distances <= reference_radii[columns]).any(1).cpu()
            covering = (distances <= sample_radii[rows, None]).any(0).cpu()
            in_reference[rows] = torch.maximum(in_reference[rows], covered.double())
            in_samples[columns] = torch.maximum(in_samples[columns], covering.double())
        moved()
    precision = _of_all(in_reference, runtime).amax(0).mean()
    recall = _of_all(in_samples, runtime).amax(0).mean()
    return precision.item(), recall.item()


def _radii(
    features: Tensor, runtime: Runtime, device: torch.device, moved: Callable[[], None]
) -> Tensor:
    """Squared distance (N,) from each row to its third-nearest other one."""
    radii = torch.zeros(len(features), dtype=torch.float64)
    for rows in _own_blocks(len(features), runtime):
        ours = features[rows].to(device)
        # itself is the nearest, at no distance
        nearest = torch.full((len(ours), NEIGHBOURS + 1), torch.inf, device=device).double()
        for columns in _blocks(len(features), COLUMNS):
            distances = _squared_distances(ours, features[columns].to(device))
            candidates = torch.cat([nearest, distances], 1)
            nearest = candidates.topk(NEIGHBOURS + 1, largest=False).values
        radii[rows] = nearest[:, NEIGHBOURS].cpu()
        moved()
    return _of_all(radii, runtime).amax(0)


def _squared_distances(first: Tensor, second: Tensor) -> Tensor:
    a, b = first.double(), second.double()
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _own_blocks(count: int, runtime: Runtime) -> Iterator[slice]:
    """Every so-manieth row of blocks: those of this process."""
    blocks = list(_blocks(count, ROWS))
    return iter(blocks[runtime.process_index :: runtime.process_count])


def _of_all(values: Tensor, runtime: Runtime) -> Tensor:
    """Float64 vectors (N,) of all processes, (processes, N)."""
    texts = runtime.exchange(base64.b64encode(values.numpy().tobytes()).decode())
    return torch.stack(
        [torch.from_numpy(np.frombuffer(base64.b64decode(text)).copy()) for text in texts]
    )
