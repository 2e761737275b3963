"""Read every byte of a folder of shards and say everything that is wrong with it."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rae_xla.data import storage
from rae_xla.data.index import Shard, ShardIndex, listing_fault, read_index
from rae_xla.data.reader import DECODE_ERRORS
from rae_xla.data.tar_samples import (
    LABEL_EXTENSION,
    DamagedTar,
    HashingReader,
    TarSample,
    parse_label,
    read_samples,
)
from rae_xla.data.worker_pool import ordered_map


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: in which file of the folder, and what."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def verify(
    path: str, progress: Callable[[int], object] | None = None, workers: int = 1
) -> list[Fault]:
    """Compare every shard with the index, decode every image, parse every label.

    Args:
        path: the folder or its ``index.json``; the shards may lie elsewhere.
        progress: called after every shard with the number of samples the index gives it.
        workers: processes, each of which reads a shard from front to back.

    Returns:
        Every fault found, in the order of the shards; none for a sound folder.

    Raises:
        UserError: if the index itself cannot be read, so that there is nothing to compare with.
    """
    index = read_index(path)
    present = storage.list_files(index.folder) if storage.exists(index.folder) else {}
    faults: list[Fault] = []
    tasks = _tasks(index, present)
    for shard, texts in zip(index.shards, ordered_map(_shard_faults, tasks, workers), strict=True):
        faults += (Fault(shard.file, text) for text in texts)
        if progress is not None:
            progress(shard.samples)
    known = {shard.file for shard in index.shards}
    if _beside_shards(path, index):
        faults += (
            Fault(name, "lies in the folder but is not in the index")
            for name in sorted(present)
            if name.endswith(".tar") and name not in known
        )
    return faults


def _beside_shards(path: str, index: ShardIndex) -> bool:
    """Whether the index lies with its shards; one elsewhere need not know all that is there."""
    folder = storage.split(path)[0] if path.endswith(".json") else path
    if storage.is_remote(folder) or storage.is_remote(index.folder):
        return folder.rstrip("/") == index.folder.rstrip("/")
    return os.path.realpath(folder) == os.path.realpath(index.folder)


@dataclass(frozen=True, eq=False)
class _Task:
    """A shard to be read, and all that the index and the listing say of it."""

    path: str
    shard: Shard
    first: int
    rows: NDArray[np.void]
    num_classes: int
    missing: bool
    listed: str | None


def _tasks(index: ShardIndex, present: dict[str, storage.FileInfo]) -> Iterator[_Task]:
    first = 0
    for shard in index.shards:
        fault = listing_fault(shard, present)
        yield _Task(
            index.path_of(shard),
            shard,
            first,
            index.samples[first : first + shard.samples],
            index.num_classes,
            shard.file not in present,
            fault and fault.removeprefix(f"{shard.file} ").removeprefix("is "),
        )
        first += shard.samples


def _shard_faults(task: _Task) -> list[str]:
    """The faults of one shard, in the order in which they are found."""
    return list(_found_faults(task))


def _found_faults(task: _Task) -> Iterator[str]:
    shard = task.shard
    if task.listed is not None:
        yield task.listed
        if task.missing or task.listed.startswith("empty"):
            return
    elif shard.bytes == 0 or shard.samples == 0:
        yield "the index says it is empty"
    seen = 0
    try:
        with storage.open_read(task.path) as raw:
            file = HashingReader(raw)
            try:
                for sample in read_samples(file):
                    if seen < shard.samples:
                        yield from _sample_faults(sample, task, seen)
                    seen += 1
            except DamagedTar as error:
                yield f"not a whole tar after {seen} samples ({error})"
            file.drain()
    except OSError as error:
        yield f"cannot be read ({error})"
        return
    if seen != shard.samples:
        yield f"holds {seen} whole samples, the index says {shard.samples}"
    if task.listed is not None:
        return  # of another size, so of course it has other checksums
    if file.sha256.hexdigest() != shard.sha256:
        yield "changed after the index was written (its SHA-256 differs)"
    elif shard.md5 is not None and file.md5.hexdigest() != shard.md5:
        yield "is what was indexed, but the MD5 in the index is another: make the index again"


def _sample_faults(sample: TarSample, task: _Task, number: int) -> Iterator[str]:
    """What of a shard's sample with this number differs from the index or cannot be used."""
    row = task.rows[number]
    where = f"sample {task.first + number} ({sample.key})"
    if sample.repeated or len(sample.extensions) != len(set(sample.extensions)):
        yield f"{where}: the key or a member of it appears twice"
    if sample.label is None:
        yield f"{where}: the label is missing (no .{LABEL_EXTENSION} member)"
    else:
        yield from _label_faults(where, sample.label, task.num_classes, int(row["label"]))
    if sample.image is None:
        yield f"{where}: the image is missing"
        return
    if (sample.offset, sample.size) != (int(row["offset"]), int(row["size"])):
        yield f"{where}: the image does not lie where the index says"
    elif zlib.crc32(sample.image) != int(row["crc32"]):
        yield f"{where}: the image changed after the index was written"
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.load()
    except DECODE_ERRORS as error:
        yield f"{where}: the image does not decode ({error})"


def _label_faults(where: str, text: bytes, num_classes: int, indexed: int) -> Iterator[str]:
    """What is wrong with the ``text`` of a label, which the index says is ``indexed``."""
    label = parse_label(text)
    if label is None:
        yield f"{where}: the label {text[:20]!r} is not a number from 0"
    elif label >= num_classes:
        yield f"{where}: label {label} is out of range (0 to {num_classes - 1})"
    elif label != indexed:
        yield f"{where}: label {label}, the index says {indexed}"
