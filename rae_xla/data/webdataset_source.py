"""Shards that exist already, ours or others': to be cut anew, resized or mixed."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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

    Where our index is, it is used, and what is read must be what was indexed; else the headers are
    read, by ``workers`` processes.

    Args:
        source: what to read.
        encoding: what becomes of the images.
        class_names: names of the labels; if None those of the index, or the numbers.
        shuffle: mix the classes, the same way every time.
        workers: processes that read and encode.

    Raises:
        UserError: if a tar is missing or damaged, or, naming tar and key, if a sample has no
            image, no label or one that is no number, or if a key is there twice; while iterating,
            if an image is missing, unreadable, or not the one that was indexed.
    """
    index: ShardIndex | None = None
    if _has_index(source):
        index = open_index(source)
        paths, places = [index.path_of(shard) for shard in index.shards], _indexed(index)
    else:
        paths = tar_files(source)
        places = _scanned(paths, workers)
    known = class_names or (None if index is None else index.class_names)
    names = names_for(int(places["label"].max()), known, source)
    order = sample_order(len(places), shuffle)
    files = "\n".join(storage.split(path)[1] for path in paths)
    contents = hash_of([files.encode(), places[order].tobytes()])
    items = _Items(paths, places, order, index)
    return ImageSource(items, _load, names, contents, encoding, workers)


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


class _Item(NamedTuple):
    """Where an image lies and its label; what an index knows besides, if there is one."""

    path: str
    offset: int
    size: int
    label: int
    crc32: int | None = None
    generation: str | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of its tar, of the version that was listed."""
        return storage.read_range(self.path, offset, size, self.generation)


def _load(encoding: Encoding, item: _Item) -> ShardSample:
    path = item.path
    try:
        content = item.read(item.offset, item.size)
    except FileNotFoundError:
        what = "disappeared; put it back"
        if item.generation is not None:
            what = "disappeared or was overwritten since it was listed; make the shards of what is "
            what += "there now, in a new folder"
        raise UserError(f"{path}: the tar has {what}") from None
    if len(content) != item.size:
        raise UserError(f"{path}: the tar became shorter since its headers were read")
    if item.crc32 is not None and zlib.crc32(content) != item.crc32:
        raise UserError(
            f"{path}: {_member_of(item)}: not the image that was indexed (its checksum differs); "
            "copy the tar again, or make its index anew"
        )
    try:
        return encoding.of_file(content, item.label, path)
    except UserError as error:
        # Only now is the name worth a second read.
        text = str(error).removeprefix(f"{path}: ")
        raise UserError(f"{path}: {_member_of(item)}: {text}") from None


def _member_of(item: _Item) -> str:
    """The name in the tar header that stands before an image."""
    header = item.read(item.offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name
    except tarfile.TarError:
        return f"the image at byte {item.offset}"


@dataclass(frozen=True)
class _Items(Sequence[Any]):
    """Every sample in an order, without a million objects."""

    paths: Sequence[str]
    places: NDArray[np.void]
    order: Sequence[int]
    indexed: ShardIndex | None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> _Item:
        number = self.order[position]
        file, offset, size, label = self.places[number].item()
        if self.indexed is None:
            return _Item(self.paths[file], offset, size, label)
        crc32 = int(self.indexed.samples["crc32"][number])
        generation = self.indexed.generations.get(self.indexed.shards[file].file)
        return _Item(self.paths[file], offset, size, label, crc32, generation)
