"""Verify a folder of shards: read every byte and report every fault."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.image_decoding import ImageError, decode_rgb
from rae_xla.data.image_finder import ImageNotes, LeftOut
from rae_xla.data.shards.index import (
    Shard,
    ShardIndex,
    list_shards,
    listing_fault,
    read_index,
)
from rae_xla.data.shards.tar_faults import DamagedTarError
from rae_xla.data.shards.tar_samples import (
    LABEL_EXTENSION,
    HashingReader,
    TarSample,
    parse_label,
    read_samples,
)
from rae_xla.data.shards.tars import is_tar, other_files
from rae_xla.data.shards.texts import LINES_FILE, has_texts
from rae_xla.data.shards.verify_captioned import (
    ShardContents,
    captioned_tasks,
    read_captioned_shard,
    text_faults,
)
from rae_xla.data.shards.worker_pool import ordered_map


@dataclass(frozen=True)
class Fault:
    """A fault, and the file of the folder that has it."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def verify(
    path: str, progress: Callable[[int], object] | None = None, workers: int = 1
) -> list[Fault]:
    """Compare every shard with the index, decode every image, parse every label or text.

    What is neither a sample nor a fault (members that are not used, other files in the folder) is
    logged, and so is what is not read of images (an EXIF rotation, more frames).

    Args:
        path: the folder of the index, or its ``index.json``.
        progress: called after every shard with the number of its samples in the index.
        workers: number of processes; each reads one shard at a time, sequentially.

    Returns:
        All faults, in the order of the shards.

    Raises:
        UserError: the index itself cannot be read.
    """
    index = read_index(path)
    folder = storage.split(path)[0] if path.endswith(".json") else path
    present = list_shards(index) if storage.exists(index.folder) else {}
    faults: list[Fault] = []
    found: Iterator[ShardContents]
    if has_texts(folder):
        faults += (Fault(LINES_FILE, fault) for fault in text_faults(index, folder))
        found = ordered_map(read_captioned_shard, captioned_tasks(index, present), workers)
    else:
        found = ordered_map(_read_shard, _tasks(index, present), workers)
    members, notes = LeftOut(), ImageNotes()
    for shard, contents in zip(index.shards, found, strict=True):
        faults += (Fault(shard.file, text) for text in contents.faults)
        members.merge(contents.left_out)
        notes.merge(contents.notes)
        if progress is not None:
            progress(shard.samples)
    members.log(f"{index.folder}: members of the tars")
    notes.log(index.folder)
    if storage.real_path(folder) == storage.real_path(index.folder):
        known = {shard.file for shard in index.shards}
        listed = {name for name in present if "/" not in name}
        faults += (
            Fault(name, "is in the folder but not in the index")
            for name in sorted(listed - known)
            if is_tar(name)
        )
        other_files(index.folder, listed, known).log(index.folder)
    return faults


@dataclass(frozen=True, eq=False)
class _Task:
    """A shard to read, with its entries in the index and in the listing of its folder."""

    path: str
    shard: Shard
    first: int
    rows: NDArray[np.void]
    num_classes: int
    missing: bool
    listing_fault: str | None


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


def _read_shard(task: _Task) -> ShardContents:
    contents = ShardContents()
    contents.faults = list(_find_faults(task, contents))
    return contents


def _find_faults(task: _Task, contents: ShardContents) -> Iterator[str]:
    """Yield the faults of a shard, and add to the other attributes of ``contents``."""
    shard = task.shard
    if task.listing_fault is not None:
        yield task.listing_fault
        if task.missing or task.listing_fault.startswith("empty"):
            return
    elif shard.bytes == 0 or shard.samples == 0:
        yield "the index lists it as empty"
    seen = 0
    try:
        with storage.open_read(task.path) as raw:
            file = HashingReader(raw)
            try:
                for sample in read_samples(file, contents.left_out):
                    if seen < shard.samples:
                        yield from _sample_faults(sample, task, seen, contents.notes)
                    seen += 1
            except DamagedTarError as error:
                yield error.describe(seen)
            file.drain()
    except OSError as error:
        yield f"cannot be read ({error})"
        return
    if seen != shard.samples:
        yield f"has {seen} complete samples, the index lists {shard.samples}"
    if task.listing_fault is not None:
        return  # the size differs, hence the checksums do
    if file.sha256.hexdigest() != shard.sha256:
        yield "changed after the index was written (its SHA-256 differs)"
    elif shard.md5 is not None and file.md5.hexdigest() != shard.md5:
        yield "has the right content, but another MD5 in the index: make the index again"


def _sample_faults(sample: TarSample, task: _Task, number: int, notes: ImageNotes) -> Iterator[str]:
    """Yield how a sample of a shard differs from the index, and why it cannot be used."""
    row = task.rows[number]
    where = f"sample {task.first + number} ({sample.key})"
    if sample.repeated or len(sample.extensions) != len(set(sample.extensions)):
        yield f"{where}: the key, or one of its members, appears twice"
    if sample.elsewhere:
        yield f"{where}: {sample.elsewhere}"
        return
    if sample.label is None:
        yield f"{where}: the label is missing (no .{LABEL_EXTENSION} member)"
    else:
        yield from _label_faults(where, sample.label, task.num_classes, int(row["label"]))
    if sample.image is None:
        yield f"{where}: the image is missing"
        return
    if (sample.offset, sample.size) != (int(row["offset"]), int(row["size"])):
        yield f"{where}: the image is not at the offset in the index"
    elif zlib.crc32(sample.image) != int(row["crc32"]):
        yield f"{where}: the image changed after the index was written"
    try:
        decode_rgb(sample.image, f"{task.shard.file}: {sample.key}", notes)
    except ImageError as error:
        yield f"{where}: the image does not decode ({error})"


def _label_faults(where: str, text: bytes, num_classes: int, indexed: int) -> Iterator[str]:
    """Yield what is wrong with a label of this ``text``; the index has the label ``indexed``."""
    label = parse_label(text)
    if label is None:
        yield f"{where}: the label {text[:20]!r} is not a number from 0"
    elif label >= num_classes:
        yield f"{where}: label {label} is out of range (0 to {num_classes - 1})"
    elif label != indexed:
        yield f"{where}: label {label}, the index lists {indexed}"
