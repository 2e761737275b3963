"""Write WebDataset shards: tar files ``shard-000000.tar`` … and the index beside them.

A sample is two members of a tar with one key, ``000000042.png`` and ``000000042.cls`` (the label
in decimal), so any WebDataset reader can use the shards. Equal samples give equal bytes: members
carry no time, owner or mode of their own.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np

from rae_xla.data import storage
from rae_xla.data.index import (
    INDEX_FILE,
    SAMPLE,
    TABLE_FILE,
    Shard,
    ShardIndex,
    open_index,
    save_index,
)
from rae_xla.data.verify import Fault, verify
from rae_xla.errors import UserError

__all__ = ["Fault", "ShardIndex", "ShardSample", "open_index", "verify", "write_shards"]

SHARD_BYTES = 256_000_000
"""Bytes of a shard unless told otherwise: thousands of samples, yet soon copied again."""

WRITING_FILE = ".writing"
"""Marks a folder being written; what lies beside it may be overwritten by the next attempt."""


@dataclass(frozen=True)
class ShardSample:
    """An encoded image (the bytes of a PNG, JPEG, …), its file extension, and its label."""

    image: bytes
    extension: str
    label: int


def write_shards(
    samples: Iterable[ShardSample],
    out_dir: str,
    *,
    classes: Sequence[str] | None = None,
    shard_size_bytes: int = SHARD_BYTES,
    samples_per_shard: int | None = None,
    prefix: str = "shard",
) -> ShardIndex:
    """Write ``samples`` in their order to a new folder of shards.

    Interrupted, it leaves a folder without an ``index.json``; the next call starts it afresh.

    Args:
        samples: read once, one at a time.
        out_dir: a folder, local or ``gs://``, that does not exist or is empty.
        classes: the name of every label; if None, their numbers, up to the largest label.
        shard_size_bytes: a shard is closed before a sample would make it larger.
        samples_per_shard: at most so many samples to a shard.
        prefix: the shards are called ``<prefix>-000000.tar`` and so on.

    Raises:
        UserError: if the folder holds something else, there is no sample, or a label is negative
            or has no name.
    """
    if shard_size_bytes < 1 or (samples_per_shard is not None and samples_per_shard < 1):
        raise UserError("a shard must have room for at least one byte and one sample")
    out_dir = str(out_dir)
    _claim(out_dir, prefix)
    writer = _Writer(out_dir, prefix, shard_size_bytes, samples_per_shard)
    shards = list(writer.shards(_checked(samples, classes)))
    if not shards:
        raise UserError(f"{out_dir}: there is no sample to write; check the source")
    table = np.array(writer.rows, SAMPLE)
    names = classes or [str(label) for label in range(int(table["label"].max()) + 1)]
    save_index(out_dir, shards, names, table)
    storage.remove(storage.join(out_dir, WRITING_FILE))
    return open_index(out_dir)


def _checked(
    samples: Iterable[ShardSample], classes: Sequence[str] | None
) -> Iterator[ShardSample]:
    for number, sample in enumerate(samples):
        if sample.label < 0 or (classes is not None and sample.label >= len(classes)):
            known = "" if classes is None else f": there are {len(classes)} classes, 0 to "
            known += "" if classes is None else f"{len(classes) - 1}"
            raise UserError(f"sample {number} has label {sample.label}, out of range{known}")
        yield sample


def _claim(folder: str, prefix: str) -> None:
    """Mark the folder as ours, clear what an interrupted attempt left, refuse anything else."""
    storage.make_folder(folder)
    present = storage.list_files(folder)
    if INDEX_FILE in present:
        raise UserError(
            f"{folder}: there are finished shards already; delete the folder or choose another"
        )
    if present and WRITING_FILE not in present:
        raise UserError(
            f"{folder}: the folder is not empty ({sorted(present)[0]} lies in it); shards need one "
            "of their own"
        )
    ours = re.compile(rf"({re.escape(prefix)}-\d{{6}}\.tar|{re.escape(TABLE_FILE)})(\.tmp-\w+)?")
    for name in present:
        if ours.fullmatch(name):
            storage.remove(storage.join(folder, name))
    storage.write_bytes(storage.join(folder, WRITING_FILE), b"")


@dataclass
class _Writer:
    """Cuts a sequence of samples into tars; ``rows`` grows by a row of the table per sample."""

    folder: str
    prefix: str
    most_bytes: int
    most_samples: int | None
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)

    def shards(self, samples: Iterator[ShardSample]) -> Iterator[Shard]:
        number, waiting = 0, next(samples, None)
        while waiting is not None:
            name = f"{self.prefix}-{number:06d}.tar"
            first = len(self.rows)
            with storage.create(storage.join(self.folder, name)) as raw:
                file = _HashingFile(raw)
                # WebDataset readers expect plain USTAR; the names are short enough for it.
                with tarfile.open(
                    fileobj=cast(BinaryIO, file), mode="w", format=tarfile.USTAR_FORMAT
                ) as tar:
                    while waiting is not None and self._fits(waiting, file, len(self.rows) - first):
                        self._add(waiting, tar, file)
                        waiting = next(samples, None)
            yield Shard(
                name,
                len(self.rows) - first,
                file.position,
                file.sha256.hexdigest(),
                file.md5.hexdigest(),
            )
            number += 1

    def _fits(self, sample: ShardSample, file: _HashingFile, count: int) -> bool:
        if count == 0:
            return True
        if self.most_samples is not None and count >= self.most_samples:
            return False
        # Two headers, a label of one block, and the two empty blocks a tar ends with.
        grown = file.position + _padded(len(sample.image)) + 5 * tarfile.BLOCKSIZE
        return grown <= self.most_bytes

    def _add(self, sample: ShardSample, tar: tarfile.TarFile, file: _HashingFile) -> None:
        key = f"{len(self.rows):09d}"
        offset = file.position + tarfile.BLOCKSIZE
        _add_member(tar, f"{key}.{sample.extension}", sample.image)
        _add_member(tar, f"{key}.cls", str(sample.label).encode())
        row = (offset, len(sample.image), sample.label, zlib.crc32(sample.image))
        self.rows.append(row)


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A new TarInfo has time, user and group 0 and mode 0644: nothing of this machine or moment.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _padded(length: int) -> int:
    return -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


class _HashingFile:
    """Passes on what is written, keeping count and checksums."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False)

    def write(self, content: bytes) -> int:
        self._file.write(content)
        self.sha256.update(content)
        self.md5.update(content)
        self.position += len(content)
        return len(content)

    def tell(self) -> int:
        return self.position
