"""Metrics of generated images: FID and relatives, Inception Score, precision, recall.

As with reconstructions, every device always works on the same number of rows (see ``chunks``), and
sums are float64 in the order of the images: no metric depends on the batch size or the devices.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rae_xla.errors import UserError
from rae_xla.evaluate.fdr6 import FDR6, combine_parts, with_parts
from rae_xla.evaluate.fdr6_networks import load_extractors
from rae_xla.evaluate.feature_networks import FeatureNetwork, load_dino
from rae_xla.evaluate.frechet import frechet_distance
from rae_xla.evaluate.image_sets import ImageSet
from rae_xla.evaluate.inception import load_inception
from rae_xla.evaluate.precision_recall import NEIGHBOURS, precision_recall
from rae_xla.evaluate.references import GenerationReference, Reference
from rae_xla.evaluate.set_features import (
    COVERAGE,
    FIDELITY,
    FRECHET,
    SetFeatures,
    measure_features,
)
from rae_xla.runtime import Backend

INCEPTION_METRICS = ("fid", "sfid", "is", FDR6, *COVERAGE)
DINO_METRIC = "fd_dinov2"
OPTIONAL_METRICS = (DINO_METRIC, FDR6)
"""Metrics of further networks, which are computed only if they are requested."""

PUBLISHED_COUNT = 50_000
"""Number of samples of published FIDs."""


@dataclass(frozen=True)
class GenReport:
    """Metrics of one or several sets of generated images.

    Attributes:
        sets: each set's name and metrics.
        num_images: number of images in each set.
        image_size: side of an image, in pixels.
        reference: what the sets were compared with; None for the Inception Score alone.
        left_out: metrics that were requested but could not be computed, with the reason.
        warnings: what limits the interpretation of the metrics.
    """

    sets: tuple[tuple[str, dict[str, float]], ...]
    num_images: int
    image_size: int
    reference: Reference | None
    left_out: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return tuple(self.sets[0][1])

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the sets."""
        return statistics.fmean(metrics[metric] for _, metrics in self.sets)

    def spread(self, metric: str) -> float | None:
        """Return the standard deviation over the sets (n - 1 in the denominator).

        Returns:
            None for a single set.
        """
        values = [metrics[metric] for _, metrics in self.sets]
        return statistics.stdev(values) if len(values) > 1 else None

    def describe(self) -> dict[str, Any]:
        """Return the content of a JSON report."""
        return {
            "metrics": {
                name: {
                    "value": self.mean(name),
                    "spread": self.spread(name),
                    "unit": None,
                    "images": self.num_images,
                }
                for name in self.metric_names
            },
            "sets": [{"path": name, "metrics": metrics} for name, metrics in self.sets],
            "num_images": self.num_images,
            "image_size": self.image_size,
            "reference": self.reference.describe() if self.reference else None,
            "left_out": self.left_out,
            "warnings": list(self.warnings),
        }


def load_networks(
    inception: str | None,
    dinov2: str | None,
    backend: Backend,
    metrics: Sequence[str],
    *,
    fdr6: Mapping[str, str | None] = MappingProxyType({}),
    without: Callable[[Sequence[str]], str],
) -> list[FeatureNetwork]:
    """Load and place the feature networks that metrics need.

    Args:
        inception: weight file of Inception; None for torch-fidelity's own download.
        dinov2: folder or hub id of DINOv2; None for ``feature_networks.DINO``.
        backend: where they are placed.
        metrics: any of ``GEN_METRICS``.
        fdr6: folders of the networks of ``fdr6``, by name.
        without: given the remaining metrics, returns the option that requests only those, for
            error messages.

    Raises:
        UserError: if a network cannot be loaded; the message names the option that omits it.
    """
    networks: list[FeatureNetwork] = []
    if any(metric in INCEPTION_METRICS for metric in metrics):
        network = load_inception(inception, without([DINO_METRIC]))
        networks.append(FeatureNetwork(network, backend))
    if DINO_METRIC in metrics:
        others = [metric for metric in metrics if metric != DINO_METRIC] or ["fid"]
        networks.append(FeatureNetwork(load_dino(dinov2, without(others)), backend))
    if FDR6 in metrics:
        others = [metric for metric in metrics if metric != FDR6] or ["fid"]
        extractors = load_extractors(fdr6, without(others))
        networks += [FeatureNetwork(extractor, backend) for extractor in extractors]
    return networks


def evaluate_generation(
    sets: Sequence[ImageSet],
    backend: Backend,
    networks: Sequence[FeatureNetwork],
    *,
    metrics: Sequence[str],
    reference: GenerationReference | None = None,
    batch_size: int = 64,
    progress: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> GenReport:
    """Compute metrics of sets of images, relative to one reference.

    All processes of a run must call this; they share the work and all get the report. Another call
    with the same networks compiles nothing new.

    Args:
        sets: one or more sets, of equal size; for several, the report has mean and spread.
        backend: where the networks are placed.
        networks: those that ``metrics`` need, from :func:`load_networks`.
        metrics: any of ``GEN_METRICS``.
        reference: from ``load_generation_reference``; None only if ``is`` is the only metric.
        batch_size: images in flight, rounded up to complete chunks; it does not change a metric.
        progress: show progress bars.
        on_progress: called after every chunk.

    Raises:
        UserError: if there are too few images, the sets differ in size, or the reference allows
            none of the metrics.
    """
    check_sets(sets, metrics)
    assert reference is not None or set(metrics) <= {"is"}, "these metrics need a reference"
    left_out: dict[str, str] = {}
    if reference is not None:
        left_out = {name: why for name, why in reference.unavailable.items() if name in metrics}
    computed = [metric for metric in metrics if metric not in left_out]
    possible = with_parts(computed)
    if not possible:
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise UserError(f"none of the metrics can be computed: {reasons}")
    reference_features = reference.features if reference else SetFeatures()
    results: list[tuple[str, dict[str, float]]] = []
    for images in sets:
        features = measure_features(
            images,
            backend,
            networks,
            possible,
            batch_size=batch_size,
            progress=progress,
            on_progress=on_progress,
        )
        values = _compare(features, reference_features, possible, backend, on_progress)
        results.append((images.name, values))
    return GenReport(
        sets=tuple(results),
        num_images=sets[0].count,
        image_size=sets[0].side,
        reference=reference.source if reference else None,
        left_out=left_out,
        warnings=_warnings(reference.source, sets[0].count, computed) if reference else (),
    )


def _warnings(reference: Reference, count: int, metrics: Sequence[str]) -> tuple[str, ...]:
    """Return warnings about the numbers of images that Fréchet distances compare."""
    warnings: list[str] = []
    if "fid" in metrics or "sfid" in metrics:
        if warning := reference.warning(count):
            warnings.append(warning)
        elif reference.count is None and count < PUBLISHED_COUNT:
            warnings.append(
                f"published FIDs use {PUBLISHED_COUNT:,} samples; fewer, such as these {count:,}, "
                "give larger values"
            )
    images = reference.count if reference.images is None else reference.images
    if FDR6 in metrics and count < PUBLISHED_COUNT:
        warnings.append(
            f"published values of {FDR6} use {PUBLISHED_COUNT:,} samples; fewer, such as these "
            f"{count:,}, give larger values"
        )
    if DINO_METRIC in metrics and images != count:
        warnings.append(
            f"{DINO_METRIC} compares {count} samples with {images} images: both numbers bias it, "
            "so compare it only with values of equal numbers"
        )
    return tuple(warnings)


def check_sets(sets: Sequence[ImageSet], metrics: Collection[str]) -> None:
    """Check that sets have enough images for the metrics, and equal sizes.

    Raises:
        UserError: if they do not.
    """
    first = sets[0]
    for other in sets[1:]:
        if (other.count, other.side) != (first.count, first.side):
            raise UserError(
                f"{first.name} has {first.count} images of {first.side} pixels a side, but "
                f"{other.name} has {other.count} of {other.side}: metrics are averaged over equal "
                "sets only; give --num-images, or evaluate the sets one by one"
            )
    for metric in metrics:
        fewest = 2 if metric in FRECHET else NEIGHBOURS + 1 if metric in COVERAGE else 1
        if first.count < fewest:
            raise UserError(
                f"{metric} of {first.count} images ({first.name}): at least {fewest} are needed, "
                "and tens of thousands for a value that can be compared with others"
            )


def _compare(
    features: SetFeatures,
    reference: SetFeatures,
    metrics: Sequence[str],
    backend: Backend,
    on_progress: Callable[[], None],
) -> dict[str, float]:
    """Return the metrics of a set, in every process."""
    values = dict(features.scores)
    if any(metric in COVERAGE for metric in metrics):
        assert features.rows is not None
        assert reference.rows is not None
        both = precision_recall(reference.rows, features.rows, backend, on_progress)
        values |= dict(zip(COVERAGE, both, strict=True))
    if backend.process_index == 0:
        for metric in metrics:
            if metric in FRECHET:
                name = FRECHET[metric]
                other = reference.gaussians.get(metric) or reference.gaussians[name]
                values[metric] = frechet_distance(features.gaussians[name], other)
                on_progress()
        values = combine_parts(values)
    # every process takes the values of process 0, which JSON preserves to the last bit
    values = json.loads(backend.all_gather_text(json.dumps(values))[0])
    names = [name for m in metrics for name in ([m, FIDELITY] if m == "is" else [m])] + [FDR6]
    return {name: values[name] for name in names if name in values}
