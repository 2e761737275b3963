"""Image source: a data set of the Hugging Face hub, or parquet files of images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.class_names import in_label_order, names_for, warn_of_numbers
from rae_xla.data.image_decoding import IMAGE_EXTENSIONS
from rae_xla.data.image_finder import LeftOut, find_files
from rae_xla.data.shards.encoding import ORIGINALS, Encoding, ShardSample
from rae_xla.data.shards.sources.base import ImageSource, hash_of, sample_order
from rae_xla.errors import UserError

HUB_PREFIX = "hf:"


def hub_source(
    source: str,
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    encoding: Encoding = ORIGINALS,
    class_names: tuple[str, ...] | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> ImageSource:
    """Return a source of images from a data set that ``datasets`` can load.

    Args:
        source: a repository ``hf:owner/name``, a local ``.parquet`` file, a local folder of such
            files, or a folder that ``save_to_disk`` of ``datasets`` wrote; of the others
            ``datasets`` keeps a copy in its cache (``HF_HOME``).
        split: of the repository or folder.
        image_column: if None, the only column of images.
        label_column: integers, class labels or class names; if None, the only one of class labels.
        encoding: how images are encoded.
        class_names: names of the labels; if None, those of the column, or the numbers.
        shuffle: shuffle the images, always the same way.
        workers: number of processes that read and encode.

    Raises:
        UserError: ``datasets`` is not installed, the source cannot be read, a column has another
            type, or a row has no label; while iterating, if an image cannot be read, or a row names
            a file outside of the data set.
    """
    table = open_table(source, split)
    import datasets

    image = image_column or only_column(table, datasets.Image, source, "--image-column")
    label = label_column or only_column(table, datasets.ClassLabel, source, "--label-column")
    check_columns(table, [image, label], source)
    labels, names = _labels(table, label, class_names, source)
    images = encoded_images(table, image, source)
    order = sample_order(len(labels), shuffle)
    # The total size represents the content: hashing all images would take as long as
    # making the shards.
    size = str(table.info.dataset_size or "").encode()
    contents = hash_of([image.encode(), size, labels[order].tobytes()])
    load = TableImages(source, images, image, folders_of(source))
    items = [(row, int(labels[row])) for row in order]
    return ImageSource(items, load, names, contents, encoding, workers)


def check_columns(table: Any, names: list[str], source: str) -> None:
    """Raise unless a table has these columns."""
    for name in names:
        if name not in table.column_names:
            raise UserError(f"{source}: no column {name!r}; there are {_columns(table)}")


def encoded_images(table: Any, column: str, source: str) -> Any:
    """Return the column of encoded images of a table."""
    import datasets

    try:
        return table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's, for a column of another type
        raise UserError(
            f"{source}: column {column!r} has no images ({_first_line(error)})"
        ) from None


@dataclass(frozen=True)
class TableImages:
    """Reads and encodes a row; it pickles as the names of the files in the library's cache."""

    source: str
    table: Any
    column: str
    folders: tuple[str, ...]

    def __call__(self, encoding: Encoding, item: tuple[int, int]) -> ShardSample:
        """Return the encoded sample of a row and a label."""
        row, label = item
        return encoding.of_file(self.content(row), label, f"{self.source}, row {row}")

    def content(self, row: int) -> bytes:
        """Return the encoded image of a row.

        Raises:
            UserError: there is none.
        """
        cell = self.table[row][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise UserError(f"{self.source}: row {row} has no image; remove the row")
        content: bytes | None = cell["bytes"]
        return self._read_named(row, cell["path"]) if content is None else content

    def _read_named(self, row: int, name: str) -> bytes:
        """Read the file that a row names; files outside of the data set could be the user's own."""
        where = f"{self.source}: row {row} names the file {name}"
        path = os.path.realpath(os.path.join(self.folders[0], name))
        inside = any(os.path.commonpath([path, folder]) == folder for folder in self.folders)
        if storage.is_remote(name) or not inside:
            raise UserError(
                f"{where}, which is not in {self.folders[0]}: only files of the data set "
                "itself are read; move it there, or store the images in the parquet files"
            )
        try:
            return storage.read_bytes(path)
        except FileNotFoundError:
            raise UserError(f"{where}, which does not exist") from None


def folders_of(source: str) -> tuple[str, ...]:
    """Return the folders of a data set's files, with symbolic links resolved.

    For a repository: the library's copy of it, and the folder of unpacked archives.
    """
    folders = [os.path.dirname(source) if source.endswith(".parquet") else source]
    if source.startswith(HUB_PREFIX):
        import datasets
        from huggingface_hub import constants

        name = source.removeprefix(HUB_PREFIX).replace("/", "--")
        copy = os.path.join(constants.HF_HUB_CACHE, f"datasets--{name}")
        folders = [copy, str(datasets.config.EXTRACTED_DATASETS_PATH)]
    return tuple(os.path.realpath(folder) for folder in folders)


def is_saved_dataset(path: str) -> bool:
    """Return whether ``save_to_disk`` of ``datasets`` wrote a folder."""
    return any(os.path.isfile(os.path.join(path, n)) for n in ("state.json", "dataset_dict.json"))


def holds_columns(path: str) -> bool:
    """Return whether a path names a table: ``hf:``, parquet files, or a saved data set.

    Raises:
        UserError: it names a parquet file that does not exist.
    """
    if path.startswith(HUB_PREFIX) or is_saved_dataset(path):
        return True
    if path.endswith(".parquet"):
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file (parquet files are read from a local disk)")
        return True
    folders = [path, os.path.join(path, "data")]
    return any(
        name.endswith(".parquet") and not name.startswith(".")
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
    )


def open_table(source: str, split: str) -> Any:
    """Open a data set with the library ``datasets``; see ``hub_source``.

    Raises:
        UserError: the library is not installed, or the data set cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{source}: reading it needs the package datasets: pip install 'rae-xla[hub]'"
        ) from None

    try:
        if source.startswith(HUB_PREFIX):
            return datasets.load_dataset(source.removeprefix(HUB_PREFIX), split=split)
        if is_saved_dataset(source):
            loaded = datasets.load_from_disk(source)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files={split: source}, split=split)
        left_out = LeftOut()
        find_files(source, left_out, {"parquet", *IMAGE_EXTENSIONS})  # rows may name images
        left_out.log(source)
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # of the library, its HTTP client, pyarrow …
        cause = error.__cause__ or error
        raise UserError(
            f"{source}: cannot be read as a data set with the split {split!r} "
            f"({type(cause).__name__}: {_first_line(cause)}); check the name, the split, and for a "
            "repository the network and `hf auth login`"
        ) from None


def only_column(table: Any, kind: type, source: str, option: str) -> str:
    """Return the name of the only column of a kind; ``option`` chooses another."""
    found = [name for name, feature in table.features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        many = f"{len(found)} columns" if found else "no column"
        raise UserError(
            f"{source}: {many} of type {kind.__name__}; choose one with {option}: "
            f"there are {_columns(table)}"
        )
    return str(found[0])


def _columns(table: Any) -> str:
    def kind(feature: Any) -> str:
        dtype = getattr(feature, "dtype", None)
        name = type(feature).__name__
        return f"{name} {dtype}" if name == "Value" else name

    return ", ".join(f"{name} ({kind(feature)})" for name, feature in table.features.items())


def _labels(
    table: Any, column: str, given: tuple[str, ...] | None, source: str
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the label of every row, and the names of the classes."""
    values = list(table[column][:])
    where = f"{source}, column {column!r}"
    bad = [i for i, value in enumerate(values) if not isinstance(value, int | str)]
    if bad:
        raise UserError(f"{where}: the label of row {bad[0]} is {values[bad[0]]!r}")
    if not values:
        raise UserError(f"{source}: there is no row in it; check the split")
    if len({isinstance(value, str) for value in values}) > 1:
        raise UserError(f"{where}: some labels are numbers, others are names: make them alike")
    if isinstance(values[0], str):
        names = given or tuple(in_label_order(set(values)))
        if given is None:
            warn_of_numbers(names, f"{where}: class")
        number = {name: label for label, name in enumerate(names)}
        unknown = sorted(set(values) - set(number))
        if unknown:
            raise UserError(f"{where}: --classes gives no label to {', '.join(unknown[:3])}")
        return np.array([number[value] for value in values], np.int64), names
    labels = np.array(values, np.int64)
    if np.min(labels) < 0:
        raise UserError(
            f"{where}: the label of row {np.argmin(labels)} is {np.min(labels)}: the split has "
            "no labels; choose another with --split"
        )
    own = getattr(table.features[column], "names", None)
    if own and given is None:
        warn_of_numbers(own, f"{where}: class")
    return labels, names_for(int(np.max(labels)), given or (tuple(own) if own else None), where)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
