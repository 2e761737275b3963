"""Image source: arrays of pixels, in memory or in NumPy files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rae_xla.data.class_names import names_for
from rae_xla.data.image_finder import LeftOut
from rae_xla.data.shards.encoding import ORIGINALS, Encoding, ShardSample
from rae_xla.data.shards.sources.base import ImageSource, hash_of, sample_order
from rae_xla.errors import UserError

_LOAD_ERRORS = (LookupError, ValueError, EOFError, OSError, BadZipFile)


def array_source(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    encoding: Encoding = ORIGINALS,
    shuffle: bool = True,
    workers: int = 1,
) -> ImageSource:
    """Return a source of images from arrays; they become PNGs, or JPEGs of a given quality.

    Args:
        images: uint8 (N, H, W) or (N, H, W, 3).
        labels: integers (N,).
        classes: the name of every label; if None, the numbers.
        encoding: how images are encoded.
        shuffle: shuffle the images, always the same way.
        workers: number of processes that encode.

    Raises:
        UserError: an array has another shape or type, or a label is out of range.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    grey_or_rgb = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    if images.dtype != np.uint8 or not grey_or_rgb or not images.size:
        raise UserError(
            f"images are {images.dtype} of shape {images.shape}; they must be uint8 (N, H, W) or "
            "(N, H, W, 3)"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels are {labels.dtype} of shape {labels.shape}; they must be integers of shape "
            f"({len(images)},)"
        )
    names = names_for(int(labels.max()), tuple(classes) if classes else None, "labels")
    if labels.min() < 0:
        raise UserError(
            f"labels run from {labels.min()} to {labels.max()}; they must be in 0 to "
            f"{len(names) - 1}"
        )
    order = sample_order(len(images), shuffle)
    contents = hash_of(
        [
            repr(images.shape).encode(),
            memoryview(np.ascontiguousarray(images)).cast("B"),
            labels.astype(np.int64).tobytes(),
            b"mixed" if shuffle else b"in order",
        ]
    )
    return ImageSource(_Items(images, labels, order), _load, names, contents, encoding, workers)


def load_arrays(path: str, labels: str | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Load images and labels from an ``.npz`` file, or from two ``.npy`` files.

    Args:
        path: the ``.npz`` file, or the ``.npy`` file of images.
        labels: the ``.npy`` file of labels.

    Raises:
        UserError: a file is missing or has other content.
    """
    for file in (path, labels):
        if file is not None and not os.path.exists(file):
            raise UserError(f"{file}: no such file or folder")
    if labels is not None:
        return _load_array(path), _load_array(labels)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            left_out = LeftOut()
            for name in sorted(set(arrays) - {"images", "labels"}):
                left_out.add("arrays", name)
            left_out.log(path)
            return arrays["images"], arrays["labels"]
    except (*_LOAD_ERRORS, AttributeError, TypeError) as error:
        what = f" ({error})" if path.endswith(".npz") else ""
        raise UserError(
            f"{path}: cannot be read as arrays{what}: give a folder with a sub-folder of "
            "images per class, WebDataset or parquet files, hf:OWNER/NAME, an .npz file with "
            "arrays 'images' and 'labels', or an .npy file of images with --labels"
        ) from None


def _load_array(file: str) -> NDArray[Any]:
    try:
        with open(file, "rb") as content:
            array: NDArray[Any] = np.lib.format.read_array(content, allow_pickle=False)
            rest = content.read(1)
    except _LOAD_ERRORS as error:
        raise UserError(f"{file}: cannot be read as arrays ({error}): give an .npy file") from None
    if rest:
        raise UserError(f"{file}: there is data after the array: write one array to each file")
    return array


def _load(encoding: Encoding, item: tuple[NDArray[np.uint8], int]) -> ShardSample:
    return encoding.of_pixels(*item)


@dataclass(frozen=True)
class _Items(Sequence[Any]):
    """(image, label) pairs in a given order, without a copy of the arrays."""

    images: NDArray[np.uint8]
    labels: NDArray[Any]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> tuple[NDArray[np.uint8], int]:
        where = self.order[position]
        return self.images[where], int(self.labels[where])
