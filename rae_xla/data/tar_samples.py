"""The samples of a WebDataset tar: neighbouring members whose names are equal up to the first dot.

``tarfile`` takes a tar that was cut between two members for a shorter one, and garbage after a
member for its end. Both are found here: a whole tar ends with an empty block.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, cast

from rae_xla.data.reader import IMAGE_EXTENSIONS

LABEL_EXTENSION = "cls"

READ_BYTES = 256 << 10
"""Read at a time from front to back: enough that hashing and copying, not calls, take the time."""


class DamagedTar(Exception):
    """A file is no tar, or ends before its end."""


@dataclass
class TarSample:
    """A sample as it stands in the tar.

    ``key`` is its members' common name, ``offset`` and ``size`` say where its image's bytes lie in
    the tar, ``image`` is these bytes if they were read, ``label`` the text of its ``.cls``.
    """

    key: str
    extensions: list[str] = field(default_factory=list)
    label: bytes | None = None
    image: bytes | None = None
    offset: int = 0
    size: int = 0
    repeated: bool = False

    @property
    def has_image(self) -> bool:
        """Whether there is a member with the extension of an image."""
        return any(extension in IMAGE_EXTENSIONS for extension in self.extensions)

    def fault(self) -> str | None:
        """Why the sample cannot be used, if it cannot."""
        images = [extension for extension in self.extensions if extension in IMAGE_EXTENSIONS]
        if self.repeated:
            return "the key appears a second time"
        if not images:
            return f"the image is missing (there is only {self._members()})"
        if len(images) > 1:
            return f"there are {len(images)} images ({self._members()})"
        if self.label is None:
            return f"the label is missing (no .cls member, only {self._members()})"
        if self.extensions.count(LABEL_EXTENSION) > 1:
            return "there are two labels"
        if parse_label(self.label) is None:
            return f"the label {self.label[:20]!r} is not a number from 0"
        return None

    def _members(self) -> str:
        return ", ".join(f".{extension}" for extension in self.extensions)


def parse_label(text: bytes) -> int | None:
    """The label that a ``.cls`` member holds in decimal; None if it holds none."""
    stripped = text.strip()
    return int(stripped) if stripped.isdigit() and len(stripped) < 10 else None


def read_samples(file: HashingReader) -> Iterator[TarSample]:
    """The samples with their images, in one pass from front to back.

    Raises:
        DamagedTar: after the samples that are whole, if the tar does not end as a tar ends.
    """
    return _samples(cast(BinaryIO, file), "r|", file.block_at, with_images=True)


def scan_samples(file: BinaryIO) -> Iterator[TarSample]:
    """The samples without their images, which are skipped: without reading, if ``file`` can seek.

    Raises:
        DamagedTar: after the samples that are whole, if the tar does not end as a tar ends.
    """
    if not file.seekable():
        forward = HashingReader(file, checksums=False)
        return _samples(cast(BinaryIO, forward), "r|", forward.block_at, with_images=False)

    def block_at(position: int) -> bytes:
        file.seek(position)
        return file.read(tarfile.BLOCKSIZE)

    return _samples(file, "r:", block_at, with_images=False)


def _samples(
    file: BinaryIO,
    mode: Literal["r|", "r:"],
    block_at: Callable[[int], bytes],
    with_images: bool,
) -> Iterator[TarSample]:
    current: TarSample | None = None
    keys: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode=mode, bufsize=READ_BYTES) as tar:
            for member in tar:
                # It would keep all of them, more than 1 GB for a million.
                tar.members = []  # type: ignore[attr-defined]
                key, extension = _key_and_extension(member)
                if not key:
                    continue
                if current is None or key != current.key:
                    if current is not None:
                        yield current
                    current = TarSample(key, repeated=key in keys)
                    keys.add(key)
                current.extensions.append(extension)
                if extension == LABEL_EXTENSION:
                    current.label = _content(tar, member)
                elif extension in IMAGE_EXTENSIONS:
                    current.offset, current.size = member.offset_data, member.size
                    if with_images:
                        current.image = _content(tar, member)
            if current is not None:
                yield current
            if block_at(tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise DamagedTar(f"cut off, or garbage, at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DamagedTar(str(error)) from None


def _key_and_extension(member: tarfile.TarInfo) -> tuple[str, str]:
    """``("folder/name", "ext")`` of a file; two empty strings of what belongs to no sample."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    # A sparse file's bytes do not lie in one piece, so no range read could fetch them.
    if not member.isreg() or member.issparse() or not stem or not dot:
        return "", ""
    return folder + slash + stem, extension.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "only regular files are asked for"
    return file.read()


class HashingReader:
    """Passes on what is read from front to back, keeping count and, if asked, checksums."""

    def __init__(self, file: BinaryIO, checksums: bool = True) -> None:
        self._file = file
        self._checksums = checksums
        self._last = b""
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False)

    def read(self, length: int = -1) -> bytes:
        """The next ``length`` bytes; fewer only at the end."""
        content = self._file.read(length)
        if self._checksums:
            self.sha256.update(content)
            self.md5.update(content)
        self.position += len(content)
        self._last = content or self._last
        return content

    def block_at(self, position: int) -> bytes:
        """A tar's block, if it was in what was read last; else what there is of it."""
        start = position - (self.position - len(self._last))
        return self._last[start : start + tarfile.BLOCKSIZE] if start >= 0 else b""

    def drain(self) -> None:
        """Read on to the end of the file."""
        while self.read(1 << 20):
            pass
