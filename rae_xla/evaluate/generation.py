"""How good generated pictures are: FID, sFID, Inception Score, precision and recall, and the
Fréchet distance of DINOv2's features, of one or several sets.

As with reconstructions, every device always works on the same number of rows (see ``chunks``), and
what is summed is summed in float64 in the order of the pictures: no figure depends on the batch
size or the devices.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, own_rows
from rae_xla.evaluate.frechet import Gaussian, MomentStream, frechet_distance
from rae_xla.evaluate.gen_report import GenReport
from rae_xla.evaluate.inception import FeatureNetwork
from rae_xla.evaluate.inception_score import ScoreStream, adm_splits, fidelity_splits
from rae_xla.evaluate.manifold import NEIGHBOURS, precision_recall
from rae_xla.evaluate.picture_sets import PictureSet
from rae_xla.evaluate.reference import Reference
from rae_xla.progress import progress_bar
from rae_xla.runtime import Batch, Runtime
from rae_xla.sample.pictures import Pixels

FRECHET = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dino"}
"""Fréchet distances, and the features they are of."""
COVERAGE = ("precision", "recall")
INCEPTION = ("fid", "sfid", "is", *COVERAGE)
"""Metrics that need the Inception network."""
FIDELITY = "is_torch_fidelity"
FEWEST_FOR_FIDELITY = 10
USUAL = 50_000


@dataclass(frozen=True)
class Features:
    """What is known of a set's features.

    Attributes:
        gaussians: of ``pool``, ``spatial``, ``dino``; in process 0 alone, which compares them.
        rows: (N, 2048) float32 on the host, in every process, for precision and recall.
        scores: the Inception Score by both protocols; in process 0 alone.
    """

    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    rows: Tensor | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GenReference:
    """What generated pictures are compared with.

    Attributes:
        named: what it is, for reports.
        features: of it.
        missing: metrics that it does not allow, and why.
    """

    named: Reference
    features: Features
    missing: Mapping[str, str] = field(default_factory=dict)


def evaluate_generation(
    sets: Sequence[PictureSet],
    runtime: Runtime,
    networks: Sequence[FeatureNetwork],
    *,
    metrics: Sequence[str],
    reference: GenReference | None = None,
    batch_size: int = 64,
    progress: bool = False,
    moved: Callable[[], None] = lambda: None,
) -> GenReport:
    """Measure sets of pictures against one reference.

    Every process of a run calls it, shares the work and gets the report. Called again with the same
    networks it compiles nothing new.

    Args:
        sets: one or more, with equally many pictures; of several the report has mean and spread.
        runtime: where the networks are.
        networks: those that ``metrics`` need.
        metrics: any of ``GEN_METRICS``.
        reference: from ``load_gen_reference``; ``is`` alone needs none.
        batch_size: pictures under way at a time, rounded up to whole chunks; no figure depends on
            it.
        progress: show bars.
        moved: called after every chunk.

    Raises:
        UserError: too few pictures, sets that differ in size or number, or no metric that the
            reference allows.
    """
    check_sets(sets, metrics)
    assert reference is not None or set(metrics) <= {"is"}, "only the Inception Score needs none"
    left_out = {m: w for m, w in reference.missing.items() if m in metrics} if reference else {}
    possible = [metric for metric in metrics if metric not in left_out]
    if not possible:
        raise UserError(f"nothing can be measured: {'; '.join(dict.fromkeys(left_out.values()))}")
    theirs = reference.features if reference else Features()
    figures: list[tuple[str, dict[str, float]]] = []
    for pictures in sets:
        ours = measure(
            pictures,
            runtime,
            networks,
            possible,
            batch_size=batch_size,
            progress=progress,
            moved=moved,
        )
        figures.append((pictures.name, _compare(ours, theirs, possible, runtime, moved)))
    return GenReport(
        sets=tuple(figures),
        num_images=sets[0].count,
        image_size=sets[0].side,
        reference=reference.named if reference else None,
        left_out=left_out,
        warnings=_warnings(reference.named, sets[0].count, possible) if reference else (),
    )


def _warnings(reference: Reference, count: int, metrics: Sequence[str]) -> tuple[str, ...]:
    """What a reader of the Fréchet distances must know."""
    found: list[str] = []
    if "fid" in metrics or "sfid" in metrics:
        if warning := reference.warning(count):
            found.append(warning)
        elif reference.count is None and count < USUAL:
            found.append(
                f"published FIDs are of {USUAL:,} samples; fewer, such as these {count:,}, give "
                "larger ones"
            )
    images = reference.count if reference.images is None else reference.images
    if "fd_dinov2" in metrics and images != count:
        found.append(
            f"fd_dinov2 compares {count} samples with {images} images: it is biased by both counts "
            "and compares with none of others"
        )
    return tuple(found)


def check_sets(sets: Sequence[PictureSet], metrics: Collection[str]) -> None:
    """See that sets can be measured, and compared with each other.

    Raises:
        UserError: they cannot.
    """
    first = sets[0]
    for other in sets[1:]:
        if (other.count, other.side) != (first.count, first.side):
            raise UserError(
                f"{first.name} has {first.count} pictures of {first.side} pixels a side, "
                f"{other.name} {other.count} of {other.side}: the figures of sets that differ have "
                "no common mean; give --num-images, or evaluate them one by one"
            )
    for metric in metrics:
        fewest = 2 if metric in FRECHET else NEIGHBOURS + 1 if metric in COVERAGE else 1
        if first.count < fewest:
            raise UserError(
                f"{metric} of {first.count} pictures ({first.name}): {fewest} are needed at least, "
                "and tens of thousands for a figure that compares with others"
            )


def measure(
    pictures: PictureSet,
    runtime: Runtime,
    networks: Sequence[FeatureNetwork],
    metrics: Collection[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    moved: Callable[[], None] = lambda: None,
) -> Features:
    """The features of a set, as far as ``metrics`` need them; see ``evaluate_generation``."""
    streams = {FRECHET[metric]: MomentStream() for metric in metrics if metric in FRECHET}
    scores: dict[str, ScoreStream] = {}
    if "is" in metrics:
        scores["is"] = ScoreStream(adm_splits(pictures.count))
        if pictures.count >= FEWEST_FOR_FIDELITY:
            scores[FIDELITY] = ScoreStream(fidelity_splits(pictures.count))
    keep = any(metric in COVERAGE for metric in metrics)
    wanted = {*streams, *(["logits"] if scores else []), *(["pool"] if keep else [])}
    kept: list[Tensor] = []
    first = runtime.process_index == 0

    def take(real: int, made: Batch) -> None:
        host = {name: whole[:real] for name, whole in runtime.to_host(made).items()}
        for found in host.values():
            if not bool(torch.isfinite(found).all()):
                raise UserError(f"{pictures.name}: features that are not finite (NaN or infinite)")
        if keep:
            kept.append(host["pool"].clone())
        if first:
            for name, stream in streams.items():
                stream.add(host[name])
            for score in scores.values():
                score.add(host["logits"])
        moved()

    rows, own = chunk_rows(runtime), own_rows(runtime)
    starts = range(0, pictures.count, rows)
    bar = progress_bar(
        zip(starts, pictures.chunks(rows, own), strict=True),
        total=len(starts),
        unit="chunk",
        disable=not (progress and first),
    )
    running: deque[tuple[int, Batch]] = deque()
    for start, part in bar:
        chunk = runtime.put({"rows": _filled_up(part, own.stop - own.start)})["rows"]
        made: Batch = {}
        for network in networks:
            made |= network.all(chunk)
        real = min(rows, pictures.count - start)
        running.append((real, {name: made[name] for name in sorted(wanted)}))
        # the devices work on those that wait here, while the host reads and sums
        if len(running) > -(-batch_size // rows):
            take(*running.popleft())
    while running:
        take(*running.popleft())
    return Features(
        gaussians={n: s.moments().gaussian(pictures.name) for n, s in streams.items()}
        if first
        else {},
        rows=torch.cat(kept) if keep else None,
        scores={name: score.score() for name, score in scores.items()} if first else {},
    )


def _filled_up(part: Pixels, rows: int) -> Tensor:
    """Rows beyond the part, which may be empty, are black."""
    filled = np.zeros((rows, *part.shape[1:]), np.uint8)
    filled[: len(part)] = part
    return torch.from_numpy(filled)


def _compare(
    ours: Features,
    reference: Features,
    metrics: Sequence[str],
    runtime: Runtime,
    moved: Callable[[], None],
) -> dict[str, float]:
    """The figures of a set, in every process."""
    found = dict(ours.scores)
    if any(metric in COVERAGE for metric in metrics):
        assert ours.rows is not None
        assert reference.rows is not None
        both = precision_recall(reference.rows, ours.rows, runtime, moved)
        found |= dict(zip(COVERAGE, both, strict=True))
    if runtime.process_index == 0:
        for metric in metrics:
            if metric in FRECHET:
                name = FRECHET[metric]
                found[metric] = frechet_distance(ours.gaussians[name], reference.gaussians[name])
                moved()
    # what process 0 has found, to the last bit
    found = json.loads(runtime.exchange(json.dumps(found))[0])
    names = [name for m in metrics for name in ([m, FIDELITY] if m == "is" else [m])]
    return {name: found[name] for name in names if name in found}
