"""Write WebDataset shards: tar files ``shard-000000.tar`` … and the index beside them.

A sample is two members of a tar with one key, ``000000042.png`` and ``000000042.cls`` (the label
in decimal), so any WebDataset reader can use the shards. Equal samples give equal bytes: members
carry no time, owner or mode of their own.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np
import PIL
from numpy.typing import NDArray

from rae_xla.data import shard_journal, storage
from rae_xla.data.encoding import ShardSample
from rae_xla.data.image_source import ImageSource, hash_of
from rae_xla.data.index import SAMPLE, Shard, ShardIndex, open_index, save_index
from rae_xla.data.shard_journal import FinishedShard, Journal, Recipe
from rae_xla.data.verify import Fault, verify
from rae_xla.errors import UserError

__all__ = [
    "Fault",
    "ShardIndex",
    "ShardSample",
    "make_shards",
    "open_index",
    "verify",
    "write_shards",
]

SHARD_BYTES = 256_000_000
"""Bytes of a shard unless told otherwise: thousands of samples, yet soon copied again."""

Progress = Callable[[Iterator[ShardSample], int], Iterable[ShardSample]]
"""Called with the samples to come and the number of those done; gives them on."""


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

    Interrupted, it leaves a folder without an ``index.json``; the next call starts it afresh
    (``make_shards`` goes on instead).

    Args:
        samples: read once, one at a time.
        out_dir: a folder, local or ``gs://``, that does not exist or is empty.
        classes: the name of every label; if None, their numbers, up to the largest label.
        shard_size_bytes: a shard is closed before a sample would make its file larger; only one
            that is too large by itself makes a larger shard.
        samples_per_shard: at most so many samples to a shard.
        prefix: the shards are called ``<prefix>-000000.tar`` and so on.

    Raises:
        UserError: if the folder holds something else, another process writes there, there is no
            sample, or a label is negative or has no name.
    """
    writer = _Writer(str(out_dir), prefix, shard_size_bytes, samples_per_shard)
    journal = shard_journal.claim(writer.folder, {"prefix": prefix})
    try:
        for _ in writer.shards(_checked(samples, classes), journal):
            pass
        return writer.finish(classes, journal)
    except OSError:
        _check_after_failure(journal)
        raise


def make_shards(
    source: ImageSource,
    out_dir: str,
    *,
    shard_size_bytes: int = SHARD_BYTES,
    samples_per_shard: int | None = None,
    prefix: str = "shard",
    progress: Progress | None = None,
) -> ShardIndex:
    """Write a source's images to a folder of shards, going on where an interrupted call stopped.

    However often it was interrupted, and by whatever, the result is the same, byte by byte, and
    no finished shard is written twice.

    Args:
        source: what to write.
        out_dir: a folder, local or ``gs://``, that does not exist, is empty, or was begun by a
            call with an equal source and equal options; all it did may be there already.
        shard_size_bytes: a shard is closed before a sample would make its file larger; only one
            that is too large by itself makes a larger shard.
        samples_per_shard: at most so many samples to a shard.
        prefix: the shards are called ``<prefix>-000000.tar`` and so on.
        progress: wraps the samples, to show how far they are.

    Raises:
        UserError: if the folder holds something else, if it was begun otherwise (the message says
            what differs), if another process writes there, or if an image cannot be read or a file
            not be written.
    """
    writer = _Writer(str(out_dir), prefix, shard_size_bytes, samples_per_shard)
    recipe = _recipe(source, shard_size_bytes, samples_per_shard, prefix)
    if shard_journal.clear_finished(writer.folder, recipe):
        return open_index(writer.folder)
    journal = shard_journal.claim(writer.folder, recipe)
    for finished in journal.finished:
        writer.take_over(finished)
    done = writer.count
    try:
        # Closed, so that the workers end with an error and not when the program does.
        with closing(source.samples(done)) as samples:
            shown = samples if progress is None else progress(samples, done)
            for shard, rows in writer.shards(_checked(shown, source.classes, done), journal):
                journal.record(shard, rows)
        return writer.finish(source.classes, journal)
    except OSError as error:
        _check_after_failure(journal)
        where = error.filename or writer.folder
        raise UserError(
            f"{where}: {error.strerror or error}: mend that and run the same command again; it "
            "goes on after the last finished shard"
        ) from None


def _check_after_failure(journal: Journal) -> None:
    """Say so if a file could not be written because another process took the folder over."""
    with suppress(OSError):
        journal.check()


def _recipe(source: ImageSource, most_bytes: int, most_samples: int | None, prefix: str) -> Recipe:
    return {
        "images": len(source),
        "the images, their labels or order": source.contents,
        "class names": hash_of(name.encode() for name in source.classes),
        "--image-size": source.encoding.image_size,
        "--resize": source.encoding.resize,
        "--quality": source.encoding.quality,
        "--shard-size": most_bytes,
        "--samples-per-shard": most_samples,
        "prefix": prefix,
        # Another version may encode other bytes.
        "version of Pillow": PIL.__version__,
    }


def _checked(
    samples: Iterable[ShardSample], classes: Sequence[str] | None, first: int = 0
) -> Iterator[ShardSample]:
    for number, sample in enumerate(samples, first):
        if sample.label < 0 or (classes is not None and sample.label >= len(classes)):
            known = "" if classes is None else f": there are {len(classes)} classes, 0 to "
            known += "" if classes is None else f"{len(classes) - 1}"
            raise UserError(f"sample {number} has label {sample.label}, out of range{known}")
        yield sample


@dataclass
class _Writer:
    """Cuts a sequence of samples into tars, and keeps what the index will say of them."""

    folder: str
    prefix: str
    most_bytes: int
    most_samples: int | None
    written: list[Shard] = field(default_factory=list)
    tables: list[NDArray[np.void]] = field(default_factory=list)
    count: int = 0

    def __post_init__(self) -> None:
        if self.most_bytes < 1 or (self.most_samples is not None and self.most_samples < 1):
            raise UserError("a shard must have room for at least one byte and one sample")

    def take_over(self, finished: FinishedShard) -> None:
        """Count a shard that lies there already."""
        self.written.append(finished.shard)
        self.tables.append(finished.rows)
        self.count += finished.shard.samples

    def shards(
        self, samples: Iterator[ShardSample], journal: Journal
    ) -> Iterator[tuple[Shard, NDArray[np.void]]]:
        """Write shard after shard; each, with its rows of the table, when it is complete."""
        waiting = next(samples, None)
        while waiting is not None:
            name = f"{self.prefix}-{len(self.written):06d}.tar"
            rows: list[tuple[int, int, int, int]] = []
            with storage.create(storage.join(self.folder, name)) as raw:
                file = _HashingFile(raw)
                # WebDataset readers expect plain USTAR; the names are short enough for it.
                with tarfile.open(
                    fileobj=cast(BinaryIO, file), mode="w", format=tarfile.USTAR_FORMAT
                ) as tar:
                    while waiting is not None and self._fits(waiting, file, len(rows)):
                        rows.append(self._add(waiting, tar, file))
                        waiting = next(samples, None)
                journal.check()  # before the shard appears, and replaces one of its name
            sha256, md5 = file.sha256.hexdigest(), file.md5.hexdigest()
            shard, table = (
                Shard(name, len(rows), file.position, sha256, md5),
                np.array(rows, SAMPLE),
            )
            self.written.append(shard)
            self.tables.append(table)
            yield shard, table

    def finish(self, classes: Sequence[str] | None, journal: Journal) -> ShardIndex:
        """Write the index, and open it."""
        if not self.written:
            raise UserError(f"{self.folder}: there is no sample to write; check the source")
        table = np.concatenate(self.tables)
        names = classes or [str(label) for label in range(int(table["label"].max()) + 1)]
        journal.check()
        save_index(self.folder, self.written, names, table)
        journal.close()
        return open_index(self.folder)

    def _fits(self, sample: ShardSample, file: _HashingFile, count: int) -> bool:
        if count == 0:
            return True
        if self.most_samples is not None and count >= self.most_samples:
            return False
        # Two headers, a label of one block, and the two empty blocks a tar ends with; then
        # tarfile fills up the last of the records it is made of.
        grown = (
            file.position + _padded(len(sample.image), tarfile.BLOCKSIZE) + 5 * tarfile.BLOCKSIZE
        )
        return _padded(grown, tarfile.RECORDSIZE) <= self.most_bytes

    def _add(
        self, sample: ShardSample, tar: tarfile.TarFile, file: _HashingFile
    ) -> tuple[int, int, int, int]:
        key = f"{self.count:09d}"
        offset = file.position + tarfile.BLOCKSIZE
        _add_member(tar, f"{key}.{sample.extension}", sample.image)
        _add_member(tar, f"{key}.cls", str(sample.label).encode())
        self.count += 1
        return offset, len(sample.image), sample.label, zlib.crc32(sample.image)


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A new TarInfo has time, user and group 0 and mode 0644: nothing of this machine or moment.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _padded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


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
