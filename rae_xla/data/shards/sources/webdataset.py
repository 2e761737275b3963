"""Image source: existing WebDataset shards, to be resized, shuffled or split differently."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.class_names import names_for
from rae_xla.data.image_finder import LeftOut
from rae_xla.data.shards.encoding import ORIGINALS, Encoding, ShardSample
from rae_xla.data.shards.index import INDEX_FILE, ShardIndex, open_index
from rae_xla.data.shards.sources.base import ImageSource, hash_of, sample_order
from rae_xla.data.shards.tar_faults import DamagedTarError, tar_fault
from rae_xla.data.shards.tar_samples import parse_label, scan_samples, usable_samples
from rae_xla.data.shards.tars import is_tar_pattern, tar_files
from rae_xla.data.shards.worker_pool import ordered_map
from rae_xla.errors import UserError
from rae_xla.progress import progress_bar

LOCATION = np.dtype([("file", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])
"""A row per sample: number of its tar, offset and size of its image, label."""


def webdataset_source(
    source: str,
    *,
    encoding: Encoding = ORIGINALS,
    class_names: tuple[str, ...] | None = None,
    shuffle: bool = True,
    workers: int = 1,
) -> ImageSource:
    """Return a source of images from tar files.

    If there is an index, it is used, and the images must match it. Otherwise the headers of the
    tars are read.

    Args:
        source: a folder, a file, a brace pattern, or an ``index.json``; local or ``gs://``.
        encoding: how images are encoded.
        class_names: names of the labels; if None, those of the index, or the numbers.
        shuffle: shuffle the images, always the same way.
        workers: number of processes that read and encode.

    Raises:
        UserError: a tar is missing or damaged, or a sample has no image, no valid label or a
            repeated key; while iterating, if an image is missing, unreadable, or not the one that
            was indexed.
    """
    index: ShardIndex | None = None
    if _has_index(source):
        index = open_index(source)
        paths, locations = [index.path_of(shard) for shard in index.shards], _from_index(index)
    else:
        paths = tar_files(source)
        locations = _scan_all(paths, workers, source)
    known = class_names or (None if index is None else index.class_names)
    names = names_for(int(locations["label"].max()), known, source)
    order = sample_order(len(locations), shuffle)
    files = "\n".join(storage.split(path)[1] for path in paths)
    contents = hash_of([files.encode(), locations[order].tobytes()])
    items = _Items(paths, locations, order, index)
    return ImageSource(items, _load, names, contents, encoding, workers)


def _has_index(source: str) -> bool:
    if source.endswith(".json"):
        return True
    return not is_tar_pattern(source) and storage.exists(storage.join(source, INDEX_FILE))


def _from_index(index: ShardIndex) -> NDArray[np.void]:
    locations = np.empty(len(index), LOCATION)
    locations["file"] = np.repeat(
        np.arange(len(index.shards)), [shard.samples for shard in index.shards]
    )
    for column in ("offset", "size", "label"):
        locations[column] = index.samples[column]
    return locations


def _scan_all(paths: Sequence[str], workers: int, source: str) -> NDArray[np.void]:
    left_out, tables = LeftOut(), []
    scanned = ordered_map(_scan, paths, workers)
    bar = progress_bar(scanned, total=len(paths), desc="reading headers", unit="tar")
    for number, (table, unused) in enumerate(bar):
        table["file"] = number
        tables.append(table)
        left_out.merge(unused)
    left_out.log(f"{source}: members of the tars")
    return np.concatenate(tables)


def _scan(path: str) -> tuple[NDArray[np.void], LeftOut]:
    """Return the locations of the samples of one tar, as file 0, and what is not used of it."""
    rows: list[tuple[int, int, int, int]] = []
    faults: list[str] = []
    left_out = LeftOut()
    with storage.open_read(path) as file:
        try:
            for sample in usable_samples(scan_samples(file, left_out), faults):
                label = parse_label(sample.label or b"")
                assert label is not None, "a sample without a fault has a label"
                rows.append((0, sample.offset, sample.size, label))
        except (DamagedTarError, OSError) as error:
            raise UserError(f"{path}: {tar_fault(error, len(rows))}") from None
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise UserError(f"{path}: {faults[0]}{more}")
    if not rows:
        found = f" ({left_out})" if left_out.counts else ""
        raise UserError(f"{path}: there is no sample in this tar{found}; leave it out")
    return np.array(rows, LOCATION), left_out


class _Item(NamedTuple):
    """Location and label of an image; checksum and generation, if there is an index."""

    path: str
    offset: int
    size: int
    label: int
    crc32: int | None = None
    generation: str | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Return a byte range of the tar, in the version that was listed."""
        return storage.read_range(self.path, offset, size, self.generation)


def _load(encoding: Encoding, item: _Item) -> ShardSample:
    path = item.path
    try:
        content = item.read(item.offset, item.size)
    except FileNotFoundError:
        if item.generation is None:
            raise UserError(f"{path}: the tar has disappeared; restore it") from None
        raise UserError(
            f"{path}: the tar has disappeared or was overwritten since it was listed; make the "
            "shards of the current files in a new folder"
        ) from None
    if len(content) != item.size:
        raise UserError(f"{path}: the tar became shorter while it was read; copy it again")
    if item.crc32 is not None and zlib.crc32(content) != item.crc32:
        raise UserError(
            f"{path}: {_member_name(item)}: not the image that was indexed (its checksum differs); "
            "copy the tar again, or index it again"
        )
    try:
        return encoding.of_file(content, item.label, path)
    except UserError as error:
        # The name takes a second read, so it is read only for an error.
        text = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: {_member_name(item)}: {text}") from None


def _member_name(item: _Item) -> str:
    """Return the name in the tar header before an image."""
    header = item.read(item.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except tarfile.TarError:
        return f"the image at byte {item.offset}"


@dataclass(frozen=True)
class _Items(Sequence[Any]):
    """The samples in a given order, without an object for each."""

    paths: Sequence[str]
    locations: NDArray[np.void]
    order: Sequence[int]
    shard_index: ShardIndex | None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> _Item:
        number = self.order[position]
        file, offset, size, label = self.locations[number].item()
        if self.shard_index is None:
            return _Item(self.paths[file], offset, size, label)
        crc32 = int(self.shard_index.samples["crc32"][number])
        generation = self.shard_index.generations.get(self.shard_index.shards[file].file)
        return _Item(self.paths[file], offset, size, label, crc32, generation)
