"""Write WebDataset shards: tar files ``shard-000000.tar`` … and their index.

A sample is two members of a tar with the same key, ``000000042.png`` and ``000000042.cls`` (the
decimal label; with captions ``000000042.txt`` or ``.json`` in its place), so any WebDataset reader
can use the shards. The ``ShardWriter`` of the package ``webdataset`` is not used, because it cannot
resume with byte-identical shards (members carry the time of writing) and computes no offsets or
checksums for the index.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np
import PIL
from numpy.typing import NDArray

from rae_xla import storage
from rae_xla.data.image_decoding import ROTATED
from rae_xla.data.image_finder import ImageNotes
from rae_xla.data.shards import journal as shard_journal
from rae_xla.data.shards.captioned_tar import scan_captioned_tar
from rae_xla.data.shards.encoding import ShardSample
from rae_xla.data.shards.index import SAMPLE, Shard, ShardIndex, open_index, save_index
from rae_xla.data.shards.journal import FinishedShard, Journal, Recipe
from rae_xla.data.shards.sample_filter import SampleFilter
from rae_xla.data.shards.sources.base import ImageSource, hash_of
from rae_xla.data.shards.texts import save_texts
from rae_xla.errors import UserError

logger = logging.getLogger(__name__)

SHARD_BYTES = 256_000_000
"""Default size of a shard: it holds thousands of samples, and is copied again in seconds."""

Progress = Callable[[Iterator[ShardSample], int], Iterable[ShardSample]]
"""Called with the remaining samples and the number of finished ones; passes the samples on."""


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

    If it is interrupted, it leaves a folder without an ``index.json``, and the next call starts
    from the beginning (``make_shards`` resumes).

    Args:
        samples: read once, one at a time.
        out_dir: a folder, local or ``gs://``, that does not exist or is empty.
        classes: the name of every label; if None, the numbers up to the largest label.
        shard_size_bytes: maximum size of a shard's file; only a single sample that is larger
            exceeds it.
        samples_per_shard: maximum number of samples per shard.
        prefix: the shards are named ``<prefix>-000000.tar`` and so on.

    Raises:
        UserError: the folder has other content, another process writes to it, there is no sample,
            or a label is negative or has no name.
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
    """Write the images of a source to a folder of shards, resuming an interrupted call.

    The result is byte-identical however often the call was interrupted, and no finished shard is
    written twice.

    Args:
        source: what to write.
        out_dir: a folder, local or ``gs://``, that does not exist, is empty, or was left by a call
            with an equal source and equal options.
        shard_size_bytes: as for ``write_shards``.
        samples_per_shard: as for ``write_shards``.
        prefix: as for ``write_shards``.
        progress: wraps the samples, to show the progress.

    Raises:
        UserError: the folder has other content or was written with other options (the message
            names them), another process writes to it, an image cannot be read, or a file cannot be
            written.
    """
    writer = _Writer(str(out_dir), prefix, shard_size_bytes, samples_per_shard)
    writer.dropped = source.dropped
    recipe = _recipe(source, shard_size_bytes, samples_per_shard, prefix)
    if shard_journal.clear_finished(writer.folder, recipe):
        return open_index(writer.folder)
    journal = shard_journal.claim(writer.folder, recipe)
    for finished in journal.finished:
        writer.add_finished(finished, source.captioned)
    done = writer.count
    try:
        # Closed, so that after an error the workers end before the program does.
        notes = ImageNotes()
        with closing(source.samples(done)) as samples:
            shown = samples if progress is None else progress(samples, done)
            checked = _checked(shown, source.classes, done, notes)
            for shard, rows in writer.shards(checked, journal):
                journal.record(shard, rows)
        notes.log(writer.folder)
        if ROTATED in notes.counts:
            logger.warning("--upright stores rotated images as they are viewed")
        return writer.finish(source.classes, journal)
    except OSError as error:
        _check_after_failure(journal)
        where = error.filename or writer.folder
        raise UserError(
            f"{where}: {error.strerror or error}: fix the cause and run the same command again; "
            "it resumes after the last finished shard"
        ) from None


def _check_after_failure(journal: Journal) -> None:
    """Raise a better error if a write failed because another process took the folder over."""
    with suppress(OSError):
        journal.check()


def _recipe(source: ImageSource, max_bytes: int, max_samples: int | None, prefix: str) -> Recipe:
    # The names are written to the journal: other names would not match those of an earlier version.
    return {
        "images": len(source),
        "the images, their labels or order": source.contents,
        "class names": hash_of(name.encode() for name in source.classes),
        "--image-size": source.encoding.image_size,
        "--resize": source.encoding.resize,
        "--quality": source.encoding.quality,
        "--shard-size": max_bytes,
        "--samples-per-shard": max_samples,
        "prefix": prefix,
        **({"--upright": True} if source.encoding.upright else {}),
        # Another version may encode to other bytes.
        "version of Pillow": PIL.__version__,
    }


def _checked(
    samples: Iterable[ShardSample],
    classes: Sequence[str] | None,
    first: int = 0,
    notes: ImageNotes | None = None,
) -> Iterator[ShardSample]:
    """Yield samples, and add to ``notes`` what is not read of their images.

    Raises:
        UserError: a label is out of range.
    """
    for number, sample in enumerate(samples, first):
        if sample.label < 0 or (classes is not None and sample.label >= len(classes)):
            known = "" if classes is None else f" (0 to {len(classes) - 1})"
            raise UserError(f"sample {number} has label {sample.label}, out of range{known}")
        if sample.notes is not None and notes is not None:
            notes.merge(sample.notes)
        yield sample


@dataclass
class _Writer:
    """Writes a sequence of samples to tars, and collects the content of the index."""

    folder: str
    prefix: str
    max_bytes: int
    max_samples: int | None
    written: list[Shard] = field(default_factory=list)
    tables: list[NDArray[np.void]] = field(default_factory=list)
    count: int = 0
    texts: list[bytes] = field(default_factory=list)
    dropped: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_bytes < 1 or (self.max_samples is not None and self.max_samples < 1):
            raise UserError("the limits of a shard must be at least one byte and one sample")

    def add_finished(self, finished: FinishedShard, captioned: bool = False) -> None:
        """Add a shard that an earlier attempt wrote."""
        self.written.append(finished.shard)
        self.tables.append(finished.rows)
        self.count += finished.shard.samples
        if captioned:
            path = storage.join(self.folder, finished.shard.file)
            self.texts += scan_captioned_tar(path, SampleFilter(min_chars=0)).found.texts

    def shards(
        self, samples: Iterator[ShardSample], journal: Journal
    ) -> Iterator[tuple[Shard, NDArray[np.void]]]:
        """Write one shard after another; yield each complete one with its rows of the table."""
        pending = next(samples, None)
        while pending is not None:
            name = f"{self.prefix}-{len(self.written):06d}.tar"
            rows: list[tuple[int, int, int, int]] = []
            with storage.create(storage.join(self.folder, name)) as raw:
                file = _HashingFile(raw)
                # WebDataset readers expect plain USTAR; its limit on names is not reached.
                with tarfile.open(
                    fileobj=cast(BinaryIO, file), mode="w", format=tarfile.USTAR_FORMAT
                ) as tar:
                    while pending is not None and self._fits(pending, file, len(rows)):
                        rows.append(self._add(pending, tar, file))
                        pending = next(samples, None)
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
        """Write the index and open it."""
        if not self.written:
            raise UserError(f"{self.folder}: there is no sample to write; check the source")
        table = np.concatenate(self.tables)
        names = classes or [str(label) for label in range(int(table["label"].max()) + 1)]
        journal.check()
        if self.texts:
            save_texts(self.folder, self.texts, self.dropped)
        save_index(self.folder, self.written, names, table)
        journal.close()
        return open_index(self.folder)

    def _fits(self, sample: ShardSample, file: _HashingFile, count: int) -> bool:
        if count == 0:
            return True
        if self.max_samples is not None and count >= self.max_samples:
            return False
        # Two headers, a label of one block, and the two empty blocks at the end of a tar; tarfile
        # then fills the last record.
        size = file.position + _padded(len(sample.image), tarfile.BLOCKSIZE) + 5 * tarfile.BLOCKSIZE
        if sample.texts is not None:
            for _, content in text_members(sample.texts):
                size += _padded(len(content), tarfile.BLOCKSIZE) + tarfile.BLOCKSIZE
        return _padded(size, tarfile.RECORDSIZE) <= self.max_bytes

    def _add(
        self, sample: ShardSample, tar: tarfile.TarFile, file: _HashingFile
    ) -> tuple[int, int, int, int]:
        key = f"{self.count:09d}"
        offset = file.position + tarfile.BLOCKSIZE
        _add_member(tar, f"{key}.{sample.extension}", sample.image)
        if sample.texts is None:
            _add_member(tar, f"{key}.cls", str(sample.label).encode())
        else:
            for extension, content in text_members(sample.texts):
                _add_member(tar, f"{key}.{extension}", content)
            self.texts.append(sample.texts)
        self.count += 1
        return offset, len(sample.image), sample.label, zlib.crc32(sample.image)


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    # A new TarInfo has time, user and group 0 and mode 0644, so equal samples give equal bytes.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def text_members(texts: bytes) -> list[tuple[str, bytes]]:
    """Return extension and content of the members for the texts of a sample."""
    return [
        (
            extension,
            value.encode()
            if isinstance(value, str) and extension != "json"
            else json.dumps(value, ensure_ascii=False).encode(),
        )
        for extension, value in json.loads(texts).items()
    ]


def _padded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


class _HashingFile:
    """Wraps a file that is written; counts the bytes and computes checksums."""

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
