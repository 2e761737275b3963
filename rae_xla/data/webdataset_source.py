"""Shards that exist already, ours or others': to be cut anew, resized or mixed."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla.data import storage
from rae_xla.data.class_names import names_for
from rae_xla.data.encoding import ORIGINALS, Encoding, ShardSample
from rae_xla.data.image_source import ImageSource, hash_of, sample_order
from rae_xla.data.index import INDEX_FILE, ShardIndex, open_index
from rae_xla.data.tar_files import is_tar_pattern, tar_files
from rae_xla.data.tar_samples import DamagedTar, parse_label, scan_samples
from rae_xla.data.worker_pool import ordered_map
from rae_xla.errors import UserError

PLACE = np.dtype([("file", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
"""One row a sample: in which tar its image lies, where in it and how many bytes, its label."""


def webdataset_source(
    source: str,
    *,
    encoding: Encoding = ORIGINALS,
    class_names: tuple[str, ...] | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> ImageSource:
    """Tar files, local or ``gs://``: a folder, a file, a brace pattern, or an ``index.json``.

    Where our index is, it is used; else the headers are read, by ``workers`` processes.

    Args:
        source: what to read.
        encoding: what becomes of the images.
        class_names: names of the labels; if None those of the index, or the numbers.
        shuffle: mix the classes, the same way every time.
        workers: processes that read and encode.

    Raises:
        UserError: if a tar is missing or damaged, or, naming tar and key, if a sample has no
            image, no label or one that is no number, or if a key is there twice.
    """
    if _has_index(source):
        index = open_index(source)
        paths, places = [index.path_of(shard) for shard in index.shards], _indexed(index)
        known: tuple[str, ...] | None = index.class_names
    else:
        paths = tar_files(source)
        places = _scanned(paths, workers)
        known = None
    names = names_for(int(places["label"].max()), class_names or known, source)
    order = sample_order(len(places), shuffle)
    files = "\n".join(storage.split(path)[1] for path in paths)
    contents = hash_of([files.encode(), places[order].tobytes()])
    return ImageSource(_Items(paths, places, order), _load, names, contents, encoding, workers)


def _has_index(source: str) -> bool:
    if source.endswith(".json"):
        return True
    return not is_tar_pattern(source) and storage.exists(storage.join(source, INDEX_FILE))


def _indexed(index: ShardIndex) -> NDArray[np.void]:
    places = np.empty(len(index), PLACE)
    places["file"] = np.repeat(
        np.arange(len(index.shards)), [shard.samples for shard in index.shards]
    )
    for column in ("offset", "size", "label"):
        places[column] = index.samples[column]
    return places


def _scanned(paths: Sequence[str], workers: int) -> NDArray[np.void]:
    tables = list(ordered_map(_scan, paths, workers))
    for number, table in enumerate(tables):
        table["file"] = number
    return np.concatenate(tables)


def _scan(path: str) -> NDArray[np.void]:
    """The places of the samples of one tar, as file 0."""
    rows: list[tuple[int, int, int, int]] = []
    with storage.open_read(path) as file:
        try:
            for sample in scan_samples(file):
                if (fault := sample.fault()) is not None:
                    raise UserError(f"{path}: sample {sample.key}: {fault}")
                label = parse_label(sample.label or b"")
                assert label is not None, "a sample without a fault has a label"
                rows.append((0, sample.offset, sample.size, label))
        except (DamagedTar, OSError) as error:
            raise UserError(
                f"{path}: not a whole tar after {len(rows)} samples ({error}); copy it again"
            ) from None
    if not rows:
        raise UserError(f"{path}: there is no sample in this tar")
    return np.array(rows, PLACE)


def _load(encoding: Encoding, item: tuple[str, int, int, int]) -> ShardSample:
    path, offset, size, label = item
    try:
        content = storage.read_range(path, offset, size)
    except FileNotFoundError:
        raise UserError(f"{path}: the tar has disappeared; put it back") from None
    if len(content) != size:
        raise UserError(f"{path}: the tar became shorter since its headers were read")
    try:
        return encoding.of_file(content, label, path)
    except UserError as error:
        # Only now is the name worth a second read.
        text = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: {_member_before(path, offset)}: {text}") from None


def _member_before(path: str, offset: int) -> str:
    """The name in the tar header that stands before the content at ``offset``."""
    header = storage.read_range(path, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except tarfile.TarError:
        return f"the image at byte {offset}"


@dataclass(frozen=True)
class _Items(Sequence[Any]):
    """(tar, offset, size, label) of every sample in an order, without a million tuples."""

    paths: Sequence[str]
    places: NDArray[np.void]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> tuple[str, int, int, int]:
        file, offset, size, label = self.places[self.order[position]].item()
        return self.paths[file], offset, size, label
