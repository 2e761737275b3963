"""Features of an image set: what the metrics of generated images are computed from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.evaluate import fdr6
from rae_xla.evaluate.chunks import chunk_rows, local_rows
from rae_xla.evaluate.feature_networks import FeatureNetwork
from rae_xla.evaluate.frechet import Gaussian, MomentStream
from rae_xla.evaluate.image_sets import ImageSet
from rae_xla.evaluate.inception_score import (
    FIDELITY_SPLITS,
    ScoreStream,
    adm_splits,
    fidelity_splits,
)
from rae_xla.progress import progress_bar
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.images import Pixels
from rae_xla.sample.rows import collect_rows_later, in_flight, send_rows

FRECHET = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dino", **fdr6.FEATURES}
"""Fréchet distances by metric name, with the features that they compare."""

COVERAGE = ("precision", "recall")

FIDELITY = "is_torch_fidelity"
"""Name of the Inception Score in torch-fidelity's protocol, which is measured along with ``is``."""


@dataclass(frozen=True)
class SetFeatures:
    """Features of an image set.

    Attributes:
        gaussians: Gaussians of ``pool``, ``spatial`` and ``dino`` features; only in process 0,
            which computes Fréchet distances.
        rows: (N, 2048) float32 on the host of every process, for precision and recall.
        scores: Inception Scores by protocol; only in process 0.
    """

    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    rows: Tensor | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def measure_features(
    images: ImageSet,
    backend: Backend,
    networks: Sequence[FeatureNetwork],
    metrics: Collection[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> SetFeatures:
    """Compute the features of an image set that ``metrics`` need.

    All processes must call this; see ``evaluate_generation`` for the arguments.

    Raises:
        UserError: if features are not finite.
    """
    streams = {FRECHET[metric]: MomentStream() for metric in metrics if metric in FRECHET}
    scores: dict[str, ScoreStream] = {}
    if "is" in metrics:
        scores["is"] = ScoreStream(adm_splits(images.count))
        if images.count >= FIDELITY_SPLITS:
            scores[FIDELITY] = ScoreStream(fidelity_splits(images.count))
    keep_rows = any(metric in COVERAGE for metric in metrics)
    wanted = {*streams, *(["logits"] if scores else []), *(["pool"] if keep_rows else [])}
    kept: list[Tensor] = []
    first = backend.process_index == 0

    def add(host: Batch) -> None:
        """Add the features of a chunk."""
        for features in host.values():
            if not bool(torch.isfinite(features).all()):
                raise UserError(
                    f"{images.name}: some features are not finite; check the network weights"
                )
        if keep_rows:
            kept.append(host["pool"].clone())
        if first:
            for name, stream in streams.items():
                stream.add(host[name])
            for score in scores.values():
                score.add(host["logits"])
        on_progress()

    rows, own = chunk_rows(backend), local_rows(backend)
    starts = range(0, images.count, rows)
    bar = progress_bar(
        zip(starts, images.chunks(rows, own), strict=True),
        total=len(starts),
        unit="chunk",
        disable=not (progress and first),
    )

    def start_chunks() -> Iterator[Callable[[], Batch]]:
        for start, part in bar:
            own_rows = {"rows": _pad_chunk(part, own.stop - own.start)}
            chunk = send_rows(backend, own_rows, own.start)
            outputs: Batch = {}
            for network in networks:
                outputs |= network.all(chunk["rows"])
            kept_outputs = {name: outputs[name] for name in sorted(wanted)}
            later = collect_rows_later(backend, chunk, kept_outputs)
            yield partial(_first_rows, later, min(rows, images.count - start))

    # The devices work on the next chunks while the host reads images and sums features.
    for host in in_flight(start_chunks(), depth=-(-batch_size // rows)):
        add(host)
    return SetFeatures(
        gaussians={n: s.moments().gaussian(images.name) for n, s in streams.items()}
        if first
        else {},
        rows=torch.cat(kept) if keep_rows else None,
        scores={name: score.score() for name, score in scores.items()} if first else {},
    )


def _pad_chunk(part: Pixels, rows: int) -> Tensor:
    """Pad images, which may be none, with black ones to ``rows``."""
    padded = np.zeros((rows, *part.shape[1:]), np.uint8)
    padded[: len(part)] = part
    return torch.from_numpy(padded)


def _first_rows(later: Callable[[], Batch], count: int) -> Batch:
    """Wait for a chunk's features, and return the first ``count`` rows; the others are padding."""
    return {name: rows[:count] for name, rows in later().items()}
