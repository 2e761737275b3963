"""Read every byte of a folder of shards and say everything that is wrong with it."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, cast

from PIL import Image

from rae_xla.data import storage
from rae_xla.data.index import Shard, ShardIndex, listing_fault, read_index
from rae_xla.data.reader import DECODE_ERRORS, IMAGE_EXTENSIONS


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: in which file of the folder, and what."""

    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


def verify(path: str, progress: Callable[[int], object] | None = None) -> list[Fault]:
    """Compare every shard with the index, decode every image, parse every label.

    Args:
        path: the folder or its ``index.json``.
        progress: called with 1 for every sample read.

    Returns:
        Every fault found, in the order of the shards; none for a sound folder.

    Raises:
        UserError: if the index itself cannot be read, so that there is nothing to compare with.
    """
    index = read_index(path)
    present = storage.list_files(index.folder)
    faults: list[Fault] = []
    first = 0
    for shard in index.shards:
        for text in _shard_faults(index, shard, first, present, progress or (lambda done: None)):
            faults.append(Fault(shard.file, text))
        first += shard.samples
    known = {shard.file for shard in index.shards}
    faults += (
        Fault(name, "lies in the folder but is not in the index")
        for name in sorted(present)
        if name.endswith(".tar") and name not in known
    )
    return faults


def _shard_faults(
    index: ShardIndex,
    shard: Shard,
    first: int,
    present: Mapping[str, storage.FileInfo],
    progress: Callable[[int], object],
) -> Iterator[str]:
    """The faults of one shard, whose samples start at number ``first``."""
    if (fault := listing_fault(shard, present)) is not None:
        yield fault.removeprefix(f"{shard.file} is ")
        if shard.file not in present or not present[shard.file].size:
            return
    elif shard.bytes == 0 or shard.samples == 0:
        yield "the index says it is empty"
    with storage.open_read(index.path_of(shard)) as raw:
        file = _HashingReader(raw)
        seen = 0
        try:
            for sample in _samples(file):
                if seen < shard.samples:
                    yield from sample.faults(index, first + seen)
                seen += 1
                progress(1)
        except (tarfile.TarError, EOFError, OSError) as error:
            yield f"not a readable tar after {seen} samples ({error})"
        file.drain()
    if seen != shard.samples:
        yield f"holds {seen} whole samples, the index says {shard.samples}"
    if file.sha256.hexdigest() != shard.sha256 and fault is None:
        yield "changed after the index was written (its SHA-256 differs)"


@dataclass
class _Found:
    """A sample as it stands in the tar: its key, and its label and image if it has them."""

    key: str
    label: bytes | None = None
    image: bytes | None = None
    offset: int = 0

    def faults(self, index: ShardIndex, number: int) -> Iterator[str]:
        """What differs from the index or cannot be used."""
        row = index.samples[number]
        where = f"sample {number} ({self.key})"
        if self.label is None:
            yield f"{where}: the label is missing (no .cls member)"
        else:
            yield from _label_faults(where, self.label, index.num_classes, int(row["label"]))
        if self.image is None:
            yield f"{where}: the image is missing"
            return
        if (self.offset, len(self.image)) != (int(row["offset"]), int(row["size"])):
            yield f"{where}: the image does not lie where the index says"
        elif zlib.crc32(self.image) != int(row["crc32"]):
            yield f"{where}: the image changed after the index was written"
        try:
            with Image.open(io.BytesIO(self.image)) as image:
                image.load()
        except DECODE_ERRORS as error:
            yield f"{where}: the image does not decode ({error})"


def _label_faults(where: str, text: bytes, num_classes: int, indexed: int) -> Iterator[str]:
    """What is wrong with the ``text`` of a label, which the index says is ``indexed``."""
    try:
        label = int(text)
    except ValueError:
        yield f"{where}: the label {text[:20]!r} is not a number"
        return
    if not 0 <= label < num_classes:
        yield f"{where}: label {label} is out of range (0 to {num_classes - 1})"
    elif label != indexed:
        yield f"{where}: label {label}, the index says {indexed}"


def _samples(file: _HashingReader) -> Iterator[_Found]:
    """The samples of a tar: neighbouring members whose names are equal up to the first dot."""
    current: _Found | None = None
    with tarfile.open(fileobj=cast(BinaryIO, file), mode="r|") as tar:
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                continue
            folder, slash, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            key = folder + slash + key
            if current is None or key != current.key:
                if current is not None:
                    yield current
                current = _Found(key)
            if extension == "cls":
                current.label = content.read()
            elif extension.lower() in IMAGE_EXTENSIONS:
                current.image, current.offset = content.read(), member.offset_data
    if current is not None:
        yield current


class _HashingReader:
    """Passes on what is read, keeping its checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def read(self, length: int = -1) -> bytes:
        content = self._file.read(length)
        self.sha256.update(content)
        return content

    def drain(self) -> None:
        """Read on to the end of the file."""
        while self.read(1 << 20):
            pass
