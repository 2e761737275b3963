"""Verify images with captions: every shard, every image, and the texts."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.image_decoding import ImageError, decode_rgb
from rae_xla.data.image_finder import ImageNotes, LeftOut
from rae_xla.data.shards.captioned_tar import count_members
from rae_xla.data.shards.index import Shard, ShardIndex, listing_fault
from rae_xla.data.shards.tar_faults import DamagedTarError
from rae_xla.data.shards.tars import is_tar
from rae_xla.data.shards.texts import LINES_FILE, open_texts
from rae_xla.errors import UserError


@dataclass
class ShardContents:
    """What was found in a shard: faults in their order, members that are not used, and images."""

    faults: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: ImageNotes = field(default_factory=ImageNotes)


def text_faults(index: ShardIndex, folder: str) -> Iterator[str]:
    """Yield the faults of the texts of an index.

    Args:
        index: of the images.
        folder: of the index and the texts.
    """
    try:
        table = open_texts(folder, len(index))
    except UserError as error:
        yield str(error)
        return
    lines = storage.read_bytes(storage.join(folder, LINES_FILE))
    if not table.fingerprint.startswith(hashlib.sha256(lines).hexdigest()):
        yield "changed after the index was written (its SHA-256 differs)"


@dataclass(frozen=True, eq=False)
class CaptionedTask:
    """A shard to read, with its entries in the index and in the listing of its folder."""

    path: str
    shard: Shard
    first: int
    rows: NDArray[np.void]
    listing_fault: str | None


def captioned_tasks(
    index: ShardIndex, present: dict[str, storage.FileInfo]
) -> Iterator[CaptionedTask]:
    """Yield a task for every shard.

    Args:
        index: of the images.
        present: the files of the folders of the shards.
    """
    first = 0
    for shard in index.shards:
        fault = listing_fault(shard, present)
        rows = index.samples[first : first + shard.samples]
        yield CaptionedTask(index.path_of(shard), shard, first, rows, fault)
        first += shard.samples


def read_captioned_shard(task: CaptionedTask) -> ShardContents:
    """Read a shard, and compare its images with the index."""
    contents = ShardContents()
    contents.faults = list(_find_faults(task, contents))
    return contents


def _find_faults(task: CaptionedTask, contents: ShardContents) -> Iterator[str]:
    """Yield the faults of a shard, and add to the other attributes of ``contents``."""
    if task.listing_fault is not None:
        yield task.listing_fault.removeprefix(f"{task.shard.file} ")
        return
    try:
        content = storage.read_bytes(task.path)
    except OSError as error:
        yield f"cannot be read ({error})"
        return
    for number, row in enumerate(task.rows, start=task.first):
        offset, size = int(row["offset"]), int(row["size"])
        image = content[offset : offset + size]
        if len(image) != size or zlib.crc32(image) != int(row["crc32"]):
            yield f"image {number} changed after the index was written"
            continue
        try:
            decode_rgb(image, f"{task.shard.file}: image {number}", contents.notes)
        except ImageError as error:
            yield f"image {number} does not decode ({error})"
    if is_tar(task.shard.file):
        try:
            count_members(io.BytesIO(content), contents.left_out)
        except DamagedTarError as error:
            yield error.describe(task.shard.samples)
    if hashlib.sha256(content).hexdigest() != task.shard.sha256:
        yield "changed after the index was written (its SHA-256 differs)"
