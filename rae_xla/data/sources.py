"""Where shards come from: a folder of images, or arrays of pixels."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rae_xla.data.counter import Purpose, counter_hash
from rae_xla.data.reader import DECODE_ERRORS, IMAGE_EXTENSIONS
from rae_xla.data.shards import ShardSample
from rae_xla.data.transforms import resize_short_side, to_rgb
from rae_xla.errors import UserError

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""What is put into a shard byte by byte, and its extension there; the rest becomes PNG."""

MOST_CLASSES = 1 << 20
"""A larger label is taken for a mistake rather than for so many classes."""


@dataclass(frozen=True)
class Source:
    """Samples yet to be encoded: ``len`` of them, their class names, and how to get each.

    Iterating encodes them in order, in ``workers`` processes if that is more than one.
    """

    items: Sequence[Any]
    encode: Callable[[Any], ShardSample]
    classes: tuple[str, ...]
    workers: int = 1

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[ShardSample]:
        if self.workers <= 1:
            yield from map(self.encode, self.items)
            return
        with ProcessPoolExecutor(self.workers, get_context("spawn")) as pool:
            items = iter(self.items)
            ahead: deque[Future[ShardSample]] = deque()
            try:
                # A bounded queue: pool.map would hand over every item of a large source at once.
                ahead.extend(pool.submit(self.encode, i) for i in islice(items, 8 * self.workers))
                while ahead:
                    sample = ahead.popleft().result()
                    ahead.extend(pool.submit(self.encode, item) for item in islice(items, 1))
                    yield sample
            finally:
                for future in ahead:
                    future.cancel()


def open_source(
    path: str,
    *,
    labels: str | None = None,
    image_size: int | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> Source:
    """A folder of images or a file of arrays, whichever ``path`` is.

    Args:
        path: a folder with a sub-folder of images per class, an ``.npz`` file with arrays
            ``images`` and ``labels``, or an ``.npy`` file of images.
        labels: the ``.npy`` file of labels that belongs to an ``.npy`` file of images.
        image_size: shorten the shorter side of larger images to so many pixels.
        shuffle: mix the classes (the same way every time), so that neighbours in a shard are as
            different as the data set is; else keep the order of the source.
        workers: processes that read and encode.

    Raises:
        UserError: if there is nothing usable at ``path``.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size is {image_size}; it must be at least 1")
    if os.path.isdir(path):
        return folder_source(path, image_size=image_size, shuffle=shuffle, workers=workers)
    images, classes = _load_arrays(path, labels)
    return array_source(images, classes, image_size=image_size, shuffle=shuffle, workers=workers)


def _load_arrays(path: str, labels: str | None) -> tuple[NDArray[Any], NDArray[Any]]:
    for file in (path, labels):
        if file is not None and not os.path.exists(file):
            raise UserError(f"{file}: no such file or folder")
    try:
        loaded = np.load(path, allow_pickle=False)
        if labels is not None:
            return loaded, np.load(labels, allow_pickle=False)
        return loaded["images"], loaded["labels"]
    except (KeyError, IndexError, ValueError, EOFError, OSError, BadZipFile) as error:
        raise UserError(
            f"{path}: cannot be read as arrays ({error}): give a folder with a sub-folder of "
            "images per class, an .npz file with arrays 'images' and 'labels', or an .npy file of "
            "images with --labels"
        ) from None


def folder_source(
    folder: str, *, image_size: int | None = None, shuffle: bool = True, workers: int = 1
) -> Source:
    """A folder with a sub-folder per class; the classes are numbered by sorted name.

    Images may lie at any depth in the folder of their class. JPEG, PNG and WebP files go into the
    shards as they are, unless they are resized; everything else is stored as PNG.

    Raises:
        UserError: if there are no class folders, one is without an image, or images lie beside
            them; while iterating, if an image cannot be read.
    """
    with os.scandir(folder) as found:
        entries = sorted(
            (entry for entry in found if not entry.name.startswith(".")), key=lambda e: e.name
        )
    stray = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    if stray:
        raise UserError(
            f"{folder}: {len(stray)} images ({stray[0]}, …) lie beside the class folders: put "
            "every image into the folder of its class"
        )
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise UserError(f"{folder}: no images: there must be a sub-folder of images per class")
    items: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        files = _images_under(os.path.join(folder, name))
        if not files:
            raise UserError(f"{os.path.join(folder, name)}: the folder of class {name} is empty")
        items += ((file, label) for file in files)
    items = [items[i] for i in _order(len(items), shuffle)]
    return Source(items, partial(_encode_file, image_size), classes, workers)


def array_source(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    image_size: int | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> Source:
    """Arrays: ``images`` uint8 (N, H, W) or (N, H, W, 3), ``labels`` integers (N,).

    They become PNGs. Without ``classes`` the classes are named by their numbers.

    Raises:
        UserError: if an array has another shape or type, or a label is out of range.
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
    if labels.max() >= MOST_CLASSES:
        raise UserError(f"a label is {labels.max()}; labels are class numbers from 0")
    if classes is None:
        classes = [str(label) for label in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(
            f"labels run from {labels.min()} to {labels.max()}; they must lie in 0 to "
            f"{len(classes) - 1}"
        )
    order = _order(len(images), shuffle)
    items = _ArrayItems(images, labels, order)
    return Source(items, partial(_encode_array, image_size), tuple(classes), workers)


@dataclass(frozen=True)
class _ArrayItems(Sequence[Any]):
    """(picture, label) pairs in an order, without a second copy of the arrays."""

    images: NDArray[np.uint8]
    labels: NDArray[Any]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> tuple[NDArray[np.uint8], int]:
        where = self.order[position]
        return self.images[where], int(self.labels[where])


def _order(length: int, shuffle: bool) -> list[int]:
    if not shuffle:
        return list(range(length))
    hashes = counter_hash(Purpose.SHARD_ORDER, np.arange(length, dtype=np.int64))
    return [int(i) for i in np.argsort(hashes, kind="stable")]


def _is_image(name: str) -> bool:
    return name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and not name.startswith(".")


def _images_under(folder: str) -> list[str]:
    """The images in a folder and those below it, sorted by path."""
    return sorted(
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if _is_image(name)
    )


def _encode_file(image_size: int | None, item: tuple[str, int]) -> ShardSample:
    path, label = item
    try:
        with open(path, "rb") as file:
            content = file.read()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            kept = KEPT_FORMATS.get(image.format or "")
            if kept and (image_size is None or min(image.size) <= image_size):
                return ShardSample(content, kept, label)
            return ShardSample(_png(image, image_size), "png", label)
    except DECODE_ERRORS as error:
        raise UserError(
            f"{path}: not a readable image ({error}); mend it or move it away"
        ) from None


def _encode_array(image_size: int | None, item: tuple[NDArray[np.uint8], int]) -> ShardSample:
    pixels, label = item
    return ShardSample(_png(Image.fromarray(pixels), image_size), "png", label)


def _png(image: Image.Image, image_size: int | None) -> bytes:
    if image_size is not None and min(image.size) > image_size:
        # Of a picture resized this way the ADM centre crop is what it is of the original.
        image = resize_short_side(to_rgb(image), image_size)
    elif image.mode not in ("L", "RGB"):
        image = to_rgb(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
