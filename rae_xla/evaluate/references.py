"""Reference sets: what generated images and reconstructions are compared with.

A reference is a file of feature moments or images, or the images of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rae_xla import storage
from rae_xla.data.shards.index import ShardIndex, open_index
from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, on_devices
from rae_xla.evaluate.fdr6 import BY_METRIC, EXTRACTORS, FDR6, with_parts
from rae_xla.evaluate.feature_networks import FeatureNetwork
from rae_xla.evaluate.frechet import Gaussian, MomentStream
from rae_xla.evaluate.image_sets import ImageSet, NpzImageSet, ShardImageSet, first_images
from rae_xla.evaluate.inception import FEATURES, SPATIAL_FEATURES
from rae_xla.evaluate.npz_images import (
    HASH_DIGITS,
    IMAGES,
    NpzImages,
    array_names,
    file_hash,
    open_npz,
)
from rae_xla.evaluate.set_features import FRECHET, SetFeatures, measure_features
from rae_xla.runtime import Backend
from rae_xla.sample.rows import collect_rows_later, in_flight

PUBLISHED_NAMES = {
    "VIRTUAL_imagenet256_labeled.npz": "ADM",
    "VIRTUAL_imagenet512.npz": "ADM",
    "guided_diffusion_stats.npz": "ADM",
    "imagenet_256_fid_stats.npz": "JiT",
    "jit_in256_stats.npz": "JiT",
}
"""Names of published statistics of ImageNet by the name of their file: RAE compares with ADM's and
RAEv2 with JiT's, so that their FIDs differ by more than their models."""


@dataclass(frozen=True)
class Reference:
    """Identity of a reference set, and the Gaussian of its ``pool`` features if it is known.

    Attributes:
        kind: ``originals`` (the images of shards), ``images`` or ``moments`` (of a file).
        path: path of the file or folder.
        count: number of images; None if the file has only moments, which do not record it.
        sha256: first digits of the hash of the content.
        gaussian: Gaussian of the ``pool`` features.
        images: number of images in a file of moments, which may be a subset of those measured.
        name: of the statistics, such as ``ADM``; None if it is unknown.
        fdr6: folder with the statistics of FDr6, if they are from another place.
    """

    kind: Literal["originals", "images", "moments"]
    path: str
    count: int | None
    sha256: str
    gaussian: Gaussian | None = None
    images: int | None = None
    name: str | None = None
    fdr6: str | None = None

    def with_gaussian(self, gaussian: Gaussian) -> Reference:
        """Return the same reference with the Gaussian of its features."""
        return replace(self, gaussian=gaussian)

    def describe(self) -> dict[str, Any]:
        """Return the entries of a JSON report."""
        names = ("kind", "path", "count", "sha256", "name")
        optional = [name for name in ("images", "fdr6") if getattr(self, name)]
        return {name: getattr(self, name) for name in (*names, *optional)}

    def __str__(self) -> str:
        count = "an unknown number of" if self.count is None else f"{self.count}"
        text = {
            "originals": f"the {count} originals in {self.path}",
            "images": f"{count} images in {self.path}",
            "moments": f"moments of {count} images in {self.path}",
        }[self.kind]
        if self.images is not None:
            text += f", and the {self.images} images there"
        if self.name is not None:
            text = f"{self.name}: {text}"
        text = f"{text} (sha256 {self.sha256})"
        return text if self.fdr6 is None else f"{text}; FDr6: the statistics in {self.fdr6}"

    def warning(self, count: int) -> str | None:
        """Return a warning if ``count`` images are compared with a reference of another size."""
        if self.count is None or self.count == count:
            return None
        return (
            f"the reference has {self.count} images and {count} are compared with it: the numbers "
            "of images bias Fréchet distances, so compare this one only with those of equal numbers"
        )


@dataclass(frozen=True)
class GenerationReference:
    """A reference set for the metrics of generated images, with its features.

    Attributes:
        source: identity of the set.
        features: features of its images, or Gaussians from its file.
        unavailable: metrics that the reference does not allow, with the reason.
    """

    source: Reference
    features: SetFeatures
    unavailable: Mapping[str, str] = field(default_factory=dict)


def shard_reference(index: ShardIndex) -> Reference:
    """Return the reference that consists of the images of an index."""
    return Reference("originals", index.folder, len(index), index.fingerprint[:HASH_DIGITS])


def load_fid_reference(
    path: str | Path, features: FeatureNetwork, backend: Backend, image_size: int
) -> Reference:
    """Read a reference file for FID alone, and measure its images if it has no moments.

    Args:
        path: ``.npz`` with ``mu`` (2048,) and ``sigma`` (2048, 2048), or with ``arr_0``, uint8
            (N, H, W, 3). If it has both, the moments are used: in the ADM reference batches they
            are those of the complete data set, and the images are a subset.
        features: computes the features of images.
        backend: where ``features`` is placed.
        image_size: side of the images to compare, in pixels.

    Returns:
        A reference with its Gaussian.

    Raises:
        UserError: if the file is missing or has other content, or images of another size.
    """
    path = _local_file(path)
    if has_moments(path):
        return Reference("moments", str(path), None, file_hash(path), read_moments(path, "mu"))
    images = open_reference_images(path, image_size)
    moments = MomentStream()
    rows = chunk_rows(backend)
    started = (
        collect_rows_later(backend, chunk, {"features": features(chunk["rows"])})
        for _, chunk in on_devices(backend, images.chunks(rows))
    )
    for start, results in zip(range(0, images.count, rows), in_flight(started), strict=True):
        moments.add(results["features"][: images.count - start])
    gaussian = moments.moments().gaussian(f"reference {path}")
    return Reference("images", str(path), images.count, file_hash(path), gaussian)


def load_generation_reference(
    path: str,
    image_size: int,
    backend: Backend,
    networks: Sequence[FeatureNetwork],
    metrics: Sequence[str],
    *,
    name: str | None = None,
    fdr6: str | None = None,
    num_images: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> GenerationReference:
    """Read a reference for the metrics of generated images, and measure its images.

    All processes of a run must call this.

    Args:
        path: an ``.npz`` file with ``mu`` and ``sigma`` (for sFID also ``mu_s`` and ``sigma_s``),
            with images as ``arr_0``, or with both as in the ADM reference batches, whose images
            are the 10,000 that precision and recall use. Or a folder of shards, local or gs://,
            whose images are centre-cropped to ``image_size``.
        image_size: side of the images to compare, in pixels.
        backend: where the networks are placed.
        networks: those that ``metrics`` need.
        metrics: the metrics to compute.
        name: of the statistics, for reports; None: that of a published file.
        fdr6: folder with the statistics of FDr6 under their published names; None: those of the
            images of the reference.
        num_images: number of images of shards, from the first; None for all.
        batch_size: as for ``evaluate_generation``.
        num_workers: processes that decode the images of shards.
        progress: show a progress bar.
        on_progress: called after every chunk.

    Raises:
        UserError: if the file is missing or has other content, or images of another size.
    """
    source, images, features = _open(path, image_size, num_images, num_workers)
    source = replace(source, name=name or PUBLISHED_NAMES.get(Path(path).name))
    if fdr6 is not None and FDR6 in metrics:
        source = replace(source, fdr6=fdr6)
        features = replace(features, gaussians={**features.gaussians, **read_fdr6(fdr6)})
    unavailable: dict[str, str] = {}
    to_measure: list[str] = []
    for metric in with_parts(metrics):
        if metric == "is" or {metric, FRECHET.get(metric)} & features.gaussians.keys():
            continue
        if images is not None and not (metric == "sfid" and features.gaussians):
            to_measure.append(metric)
        elif metric == "sfid":
            unavailable[metric] = f"{path} has mu and sigma but no mu_s and sigma_s for sFID"
        elif metric in BY_METRIC:
            unavailable[FDR6] = (
                f"{path} has only moments, and {FDR6} needs images (arr_0), or a folder with the "
                "statistics of its networks (eval.fdr6_reference, --fdr6-reference)"
            )
        else:
            unavailable[metric] = f"{path} has only moments, and {metric} needs images (arr_0)"
    if images is not None and to_measure:
        measured = measure_features(
            images,
            backend,
            networks,
            to_measure,
            batch_size=batch_size,
            progress=progress,
            on_progress=on_progress,
        )
        features = replace(measured, gaussians={**measured.gaussians, **features.gaussians})
    return GenerationReference(source, features, unavailable)


def check_generation_reference(path: str, image_size: int) -> None:
    """Check a reference before networks are loaded or downloaded.

    Raises:
        UserError: if the file is missing or has other content, or images of another size.
    """
    if _is_folder(path):
        open_index(path)
        return
    file = _local_file(path)
    has_moments(file)
    if _has_images(file):
        open_reference_images(file, image_size)


def has_moments(path: Path) -> bool:
    """Return whether a reference file contains the moments of its features.

    Raises:
        UserError: if the file is missing, or contains neither moments nor images.
    """
    with open_npz(path, "reference") as archive:
        names = array_names(archive)
    if {"mu", "sigma"} <= set(names):
        return True
    if IMAGES not in names:
        raise UserError(
            f"reference {path}: neither {IMAGES} (images) nor mu and sigma (moments) found; it "
            f"contains {', '.join(names) or 'no arrays'}"
        )
    return False


def open_reference_images(path: Path, image_size: int) -> NpzImages:
    """Open the images of a reference file.

    Args:
        path: ``.npz`` file with ``arr_0``.
        image_size: side of the images to compare, in pixels.

    Raises:
        UserError: if the images have another size or type, or are fewer than two.
    """
    images = NpzImages(path, "reference")
    if images.side != image_size:
        raise UserError(
            f"reference {path}: its images are {images.side} x {images.side} pixels, those "
            f"compared with them {image_size} x {image_size}: give a reference of that size"
        )
    if images.count < 2:
        raise UserError(
            f"reference {path}: {images.count} image has no covariance; at least two are needed"
        )
    return images


def read_fdr6(folder: str) -> dict[str, Gaussian]:
    """Read the statistics of the six networks of FDr6, by the name of their distance.

    Raises:
        UserError: a file is missing, or has moments of other features.
    """
    found: dict[str, Gaussian] = {}
    for extractor in EXTRACTORS:
        path = Path(folder).expanduser() / extractor.statistics
        if not path.is_file():
            raise UserError(
                f"{path} does not exist: FDr6 compares with six files of the data set "
                "nanovisionx/nanogen-evals-stats; download them to one folder"
            )
        with open_npz(path, "reference") as archive:
            mean: Literal["mu", "ref_mu"] = "ref_mu" if "ref_mu" in array_names(archive) else "mu"
        found[extractor.metric] = read_moments(path, mean, extractor.features)
    return found


def read_moments(
    path: Path, mean_name: Literal["mu", "mu_s", "ref_mu"], size: int | None = None
) -> Gaussian:
    """Read feature moments from a reference file.

    Args:
        path: ``.npz`` file.
        mean_name: ``mu`` for ``mu`` and ``sigma`` of FID's features; ``mu_s`` for ``mu_s`` and
            ``sigma_s`` of sFID's, as in the ADM reference batches; or ``ref_mu``.
        size: number of features; None: that of FID's or sFID's.

    Raises:
        UserError: if the moments are of other features, or are not a mean and a covariance.
    """
    covariance_name = mean_name.replace("mu", "sigma")
    if size is None:
        size = FEATURES if mean_name == "mu" else SPATIAL_FEATURES
    names = f"{mean_name} or {covariance_name}"
    try:
        with open_npz(path, "reference"), np.load(path, allow_pickle=False) as arrays:
            mean, covariance = arrays[mean_name], arrays[covariance_name]
    except (ValueError, KeyError) as error:
        raise UserError(f"reference {path}: {names} cannot be read: {error}") from error
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UserError(
            f"reference {path}: {mean_name} is {mean.shape} and {covariance_name} "
            f"{covariance.shape}; the features of this network need ({size},) and "
            f"({size}, {size})"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(
            f"reference {path}: {names} has values that are not finite: compute it again"
        )
    if np.abs(covariance - covariance.T).max() > 1e-4 * np.abs(covariance).max():
        raise UserError(
            f"reference {path}: {covariance_name} is not symmetric, so it is not a covariance"
        )
    symmetric = (covariance + covariance.T) / 2
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(symmetric))


def _open(
    path: str, image_size: int, num_images: int | None, num_workers: int
) -> tuple[Reference, ImageSet | None, SetFeatures]:
    """Return a reference, its images if it has any, and the features that its file contains."""
    check_generation_reference(path, image_size)
    if _is_folder(path):
        index = first_images(open_index(path), num_images, "eval.num_images=")
        images = ShardImageSet(index, image_size, num_workers)
        return shard_reference(index), images, SetFeatures()
    file = _local_file(path)
    npz_images = NpzImageSet(file, "reference") if _has_images(file) else None
    count = npz_images.count if npz_images is not None else None
    if not has_moments(file):
        return Reference("images", path, count, file_hash(file)), npz_images, SetFeatures()
    gaussians = {"pool": read_moments(file, "mu")}
    with open_npz(file, "reference") as archive:
        if {"mu_s", "sigma_s"} <= set(array_names(archive)):
            gaussians["spatial"] = read_moments(file, "mu_s")
    source = Reference("moments", path, None, file_hash(file), images=count)
    return source, npz_images, SetFeatures(gaussians)


def _is_folder(path: str) -> bool:
    if storage.is_remote(path):
        return not path.endswith(".npz")
    return Path(path).expanduser().is_dir()


def _local_file(path: str | Path) -> Path:
    """Return the path of a reference file; raise ``UserError`` if it is in a bucket."""
    if storage.is_remote(str(path)):
        raise UserError(
            f"reference {path}: a file must be local; copy it with `gcloud storage cp` "
            "(shards may be on gs://)"
        )
    return Path(path).expanduser()


def _has_images(file: Path) -> bool:
    with open_npz(file, "reference") as archive:
        return IMAGES in array_names(archive)
