"""What a Fréchet distance is taken to: pictures or moments, and exactly which."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch

from rae_xla.data.index import ShardIndex
from rae_xla.errors import UserError
from rae_xla.evaluate.chunks import chunk_rows, on_devices
from rae_xla.evaluate.frechet import Gaussian, MomentStream
from rae_xla.evaluate.inception import FEATURES, FeatureNetwork
from rae_xla.runtime import Runtime
from rae_xla.sample.pictures import Pixels

SHOWN_DIGITS = 12


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

    def with_gaussian(self, gaussian: Gaussian) -> Reference:
        """The same set with the Gaussian of its features."""
        return replace(self, gaussian=gaussian)

    def describe(self) -> dict[str, Any]:
        """For reports."""
        return {n: getattr(self, n) for n in ("kind", "path", "count", "sha256")}

    def __str__(self) -> str:
        count = "an unknown number of" if self.count is None else f"{self.count}"
        what = {
            "originals": f"the {count} originals in {self.path}",
            "images": f"{count} images in {self.path}",
            "moments": f"moments of {count} images in {self.path}",
        }
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
    with _open_npz(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        if {"mu", "sigma"} <= names:
            gaussian = _read_moments(path)
            return Reference("moments", str(path), None, _hash(path), gaussian)
        if "arr_0" not in names:
            raise UserError(
                f"reference {path}: neither arr_0 (images) nor mu and sigma (moments); it has "
                f"{', '.join(sorted(names)) or 'nothing'}"
            )
        moments = MomentStream()
        count = 0
        pictures = _read_images(archive, path, image_size, chunk_rows(runtime))
        for part, rows in on_devices(runtime, pictures):
            found = runtime.to_host({"features": features(rows)})["features"]
            moments.add(found[: len(part)])
            count += len(part)
    gaussian = moments.moments().gaussian(f"reference {path}")
    return Reference("images", str(path), count, _hash(path), gaussian)


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    if not path.is_file():
        raise UserError(f"reference {path}: there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"reference {path} is not a readable .npz file: {error}") from error


def _read_moments(path: Path) -> Gaussian:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            mean, covariance = arrays["mu"], arrays["sigma"]
    except ValueError as error:
        raise UserError(f"reference {path}: mu or sigma cannot be read: {error}") from error
    if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
        raise UserError(
            f"reference {path}: mu is {mean.shape} and sigma {covariance.shape}; the features of "
            f"this Inception need ({FEATURES},) and ({FEATURES}, {FEATURES})"
        )
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"reference {path}: mu or sigma has values that are not finite")
    if np.abs(covariance - covariance.T).max() > 1e-4 * np.abs(covariance).max():
        raise UserError(f"reference {path}: sigma is not symmetric, so it is no covariance")
    symmetric = (covariance + covariance.T) / 2
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(symmetric))


def _read_images(
    archive: zipfile.ZipFile, path: Path, image_size: int, rows: int
) -> Iterator[Pixels]:
    """Pictures (n, 3, H, W), ``rows`` at a time: a set of 50 000 would fill the memory."""
    with archive.open("arr_0.npy") as member:
        shape, fortran, dtype = _npy_header(cast("BinaryIO", member), path)
        if dtype != np.uint8 or fortran or len(shape) != 4 or shape[3] != 3:
            raise UserError(
                f"reference {path}: arr_0 is {dtype} {shape}; it must be uint8 (N, H, W, 3)"
            )
        if shape[1:3] != (image_size, image_size):
            raise UserError(
                f"reference {path}: its images are {shape[1]} x {shape[2]} pixels, those compared "
                f"with them {image_size} x {image_size}"
            )
        if shape[0] < 2:
            raise UserError(
                f"reference {path}: {shape[0]} image has no covariance; two are needed at least"
            )
        for start in range(0, shape[0], rows):
            count = min(rows, shape[0] - start)
            data = member.read(count * math.prod(shape[1:]))
            if len(data) < count * math.prod(shape[1:]):
                raise UserError(f"reference {path}: arr_0 is truncated")
            pixels = np.frombuffer(data, np.uint8).reshape(count, *shape[1:])
            yield np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _npy_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        return readers[np.lib.format.read_magic(file)](file)
    except (KeyError, ValueError) as error:
        raise UserError(f"reference {path}: arr_0 cannot be read: {error}") from error


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()[:SHOWN_DIGITS]
