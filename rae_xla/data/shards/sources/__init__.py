"""Sources of images for shards: one module per kind, and ``open_image_source`` for all of them."""

from __future__ import annotations

import os

from rae_xla import storage
from rae_xla.data.shards.encoding import ORIGINALS, Encoding
from rae_xla.data.shards.index import INDEX_FILE
from rae_xla.data.shards.sources.arrays import array_source, load_arrays
from rae_xla.data.shards.sources.base import ImageSource
from rae_xla.data.shards.sources.captioned import open_captioned_source
from rae_xla.data.shards.sources.folder import folder_source
from rae_xla.data.shards.sources.hub import holds_columns, hub_source
from rae_xla.data.shards.sources.webdataset import webdataset_source
from rae_xla.data.shards.tars import is_tar, is_tar_pattern, refuse_compressed
from rae_xla.errors import UserError

__all__ = [
    "ImageSource",
    "array_source",
    "folder_source",
    "hub_source",
    "open_captioned_source",
    "open_image_source",
    "webdataset_source",
]


def open_image_source(
    path: str,
    *,
    encoding: Encoding = ORIGINALS,
    class_names: tuple[str, ...] | None = None,
    labels: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> ImageSource:
    """Open a source of images, whose kind follows from its path.

    Args:
        path: a folder with a sub-folder of images per class; a folder of WebDataset tars, one
            ``.tar``, a brace pattern of them or an ``index.json``, local or ``gs://``;
            ``hf:owner/name``, a ``.parquet`` file or a folder of them; an ``.npz`` file with
            arrays ``images`` and ``labels``; or an ``.npy`` file of images.
        encoding: how images are encoded.
        class_names: the names of the classes by label; if None, those of the source.
        labels: the ``.npy`` file of labels for an ``.npy`` file of images.
        split: of a data set of the hub or of parquet files.
        image_column: of a data set of the hub or of parquet files.
        label_column: of a data set of the hub or of parquet files.
        shuffle: shuffle the images (always the same way), so that every shard has samples of all
            classes; otherwise keep the order of the source.
        workers: number of processes that read and encode.

    Raises:
        UserError: there is no usable source at ``path``.
    """
    from_columns = holds_columns(path)
    if not from_columns and (image_column or label_column):
        raise UserError(
            f"{path}: --image-column and --label-column are for data sets of the hub and parquet "
            "files; leave them out"
        )
    refuse_compressed([path])
    if labels is not None and not path.endswith(".npy"):
        raise UserError(f"{path}: --labels is for an .npy file of images; leave it out")
    if path.endswith(".npy") and labels is None:
        raise UserError(f"{path}: give the labels of the images as --labels FILE.npy")
    if from_columns:
        return hub_source(
            path,
            split=split,
            image_column=image_column,
            label_column=label_column,
            encoding=encoding,
            class_names=class_names,
            shuffle=shuffle,
            workers=workers,
        )
    if _holds_tars(path):
        return webdataset_source(
            path, encoding=encoding, class_names=class_names, shuffle=shuffle, workers=workers
        )
    if os.path.isdir(path):
        return folder_source(
            path, encoding=encoding, class_names=class_names, shuffle=shuffle, workers=workers
        )
    images, numbers = load_arrays(path, labels)
    return array_source(
        images, numbers, classes=class_names, encoding=encoding, shuffle=shuffle, workers=workers
    )


def _holds_tars(path: str) -> bool:
    # Tars are the only source that can be read from a bucket.
    if storage.is_remote(path) or is_tar_pattern(path) or path.endswith(".json"):
        return True
    if not os.path.isdir(path):
        return False
    names = storage.list_files(path)
    return INDEX_FILE in names or any(map(is_tar, names))
