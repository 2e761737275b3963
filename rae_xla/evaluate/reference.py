"""What a Fréchet distance is taken to: pictures or moments, and exactly which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rae_xla.data.index import ShardIndex
from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, on_devices
from rae_xla.evaluate.frechet import Gaussian, MomentStream
from rae_xla.evaluate.inception import FEATURES, SPATIAL_FEATURES, FeatureNetwork
from rae_xla.evaluate.npz_images import (
    IMAGES,
    SHOWN_DIGITS,
    NpzImages,
    array_names,
    file_hash,
    open_npz,
)
from rae_xla.runtime import Runtime


@dataclass(frozen=True)
class Reference:
    """A named set of pictures, and its features' Gaussian once that is known."""

    kind: Literal["originals", "images", "moments"]
    path: str
    count: int | None
    """Pictures in it; None: the file has moments alone and does not say."""
    sha256: str
    """First digits of the hash of its content."""
    gaussian: Gaussian | None = None
    images: int | None = None
    """Pictures in it that its moments are not, or not only, of."""

    def with_gaussian(self, gaussian: Gaussian) -> Reference:
        """The same set with the Gaussian of its features."""
        return replace(self, gaussian=gaussian)

    def describe(self) -> dict[str, Any]:
        """For reports."""
        names = ("kind", "path", "count", "sha256", *(["images"] if self.images else []))
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        count = "an unknown number of" if self.count is None else f"{self.count}"
        what = {
            "originals": f"the {count} originals in {self.path}",
            "images": f"{count} images in {self.path}",
            "moments": f"moments of {count} images in {self.path}",
        }
        if self.images is not None:
            what["moments"] += f", and the {self.images} images there"
        return f"{what[self.kind]} (sha256 {self.sha256})"

    def warning(self, count: int) -> str | None:
        """What to tell a user who compares ``count`` pictures with it, if anything."""
        if self.count is None or self.count == count:
            return None
        return (
            f"the reference has {self.count} images and {count} are compared with it: Fréchet "
            "distances are biased by the counts, so this one compares with none of other counts"
        )


def originals(index: ShardIndex) -> Reference:
    """The very images that are reconstructed."""
    return Reference("originals", index.folder, len(index), index.fingerprint[:SHOWN_DIGITS])


def load_reference(
    path: str | Path, features: FeatureNetwork, runtime: Runtime, image_size: int
) -> Reference:
    """Read a reference file.

    Args:
        path: ``.npz`` with ``mu`` (2048,) and ``sigma`` (2048, 2048), or with ``arr_0``, uint8
            (N, H, W, 3). Where it has both (as the ADM reference batches do, whose moments are
            those of the whole set and whose images are a part of it) the moments count.
        features: takes the features of images.
        runtime: where ``features`` is.
        image_size: side in pixels of the pictures to be compared.

    Raises:
        UserError: no such file, another content, or pictures of another size.
    """
    path = Path(path).expanduser()
    if moments_in(path):
        return Reference("moments", str(path), None, file_hash(path), read_moments(path, "mu"))
    images = open_images(path, image_size)
    moments = MomentStream()
    for part, rows in on_devices(runtime, images.chunks(chunk_rows(runtime))):
        moments.add(runtime.to_host({"features": features(rows)})["features"][: len(part)])
    gaussian = moments.moments().gaussian(f"reference {path}")
    return Reference("images", str(path), images.count, file_hash(path), gaussian)


def moments_in(path: Path) -> bool:
    """Whether a reference file has the moments of its features.

    Raises:
        UserError: no such file, or one with neither moments nor images.
    """
    with open_npz(path, "reference") as archive:
        names = array_names(archive)
    if {"mu", "sigma"} <= set(names):
        return True
    if IMAGES not in names:
        raise UserError(
            f"reference {path}: neither {IMAGES} (images) nor mu and sigma (moments); it has "
            f"{', '.join(names) or 'nothing'}"
        )
    return False


def open_images(path: Path, image_size: int) -> NpzImages:
    """The images of a reference file, for pictures of ``image_size`` pixels a side.

    Raises:
        UserError: images of another size or type, or fewer than two.
    """
    images = NpzImages(path, "reference")
    if images.side != image_size:
        raise UserError(
            f"reference {path}: its images are {images.side} x {images.side} pixels, those "
            f"compared with them {image_size} x {image_size}"
        )
    if images.count < 2:
        raise UserError(
            f"reference {path}: {images.count} image has no covariance; two are needed at least"
        )
    return images


def read_moments(path: Path, mean_name: Literal["mu", "mu_s"]) -> Gaussian:
    """Moments in a reference file: ``mu`` and ``sigma`` of FID's features, or ``mu_s`` and
    ``sigma_s`` of sFID's, as the ADM reference batches have them.

    Raises:
        UserError: moments of other features, or what is no covariance.
    """
    covariance_name = mean_name.replace("mu", "sigma")
    size = FEATURES if mean_name == "mu" else SPATIAL_FEATURES
    names = f"{mean_name} or {covariance_name}"
    try:
        with open_npz(path, "reference"), np.load(path, allow_pickle=False) as arrays:
            mean, covariance = arrays[mean_name], arrays[covariance_name]
    except ValueError as error:
        raise UserError(f"reference {path}: {names} cannot be read: {error}") from error
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise UserError(
            f"reference {path}: {mean_name} is {mean.shape} and {covariance_name} "
            f"{covariance.shape}; the features of this Inception need ({size},) and "
            f"({size}, {size})"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"reference {path}: {names} has values that are not finite")
    if np.abs(covariance - covariance.T).max() > 1e-4 * np.abs(covariance).max():
        raise UserError(
            f"reference {path}: {covariance_name} is not symmetric, so it is no covariance"
        )
    symmetric = (covariance + covariance.T) / 2
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(symmetric))
