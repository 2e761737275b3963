"""WebDataset tar files: find them, and read their samples.

A sample is a sequence of adjacent members whose names are equal up to the first dot. The
``webdataset`` package is not used for reading: it skips damaged samples, and gives no offsets.
``tarfile`` takes a tar that was cut between two members for a shorter one, and garbage after a
member for its end; both are detected here, because a complete tar ends with an empty block.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, cast

from rae_xla import storage
from rae_xla.data.shards.index import WRITING_FILE
from rae_xla.data.transforms import IMAGE_EXTENSIONS
from rae_xla.errors import UserError

LABEL_EXTENSION = "cls"

READ_BYTES = 256 << 10
"""Bytes per read of a stream: enough that hashing and copying take the time, not the calls."""

_BRACES = re.compile(r"\{([^{}]*)\}")


def tar_files(source: str) -> list[str]:
    """Return the paths of the tar files that ``source`` names.

    Args:
        source: a folder (its files are sorted by name), one file, or a brace pattern such as
            ``x-{0000..1023}.tar``; local or ``gs://``.

    Raises:
        UserError: there are none, some do not exist, or the folder is being written.
    """
    if not is_tar_pattern(source):
        if not storage.is_folder(source):
            raise UserError(f"{source}: no such folder or tar file")
        present = storage.list_files(source)
        if WRITING_FILE in present:
            raise UserError(
                f"{source}: shards are being written here, or writing them was interrupted: let "
                "`rae-xla shards make` finish first"
            )
        names = sorted(n for n in present if n.lower().endswith(".tar") and n[0] != ".")
        if not names:
            raise UserError(f"{source}: there is no .tar file in this folder")
        return [storage.join(source, name) for name in names]
    paths = expand_braces(source)
    folders = sorted({storage.split(path)[0] for path in paths})
    listed = {
        folder: storage.list_files(folder) if storage.is_folder(folder) else {}
        for folder in folders
    }
    split = [(path, *storage.split(path)) for path in paths]
    missing = [path for path, folder, name in split if name not in listed[folder]]
    if missing:
        more = f" and {len(missing) - 3} more of {len(paths)}" if len(missing) > 3 else ""
        raise UserError(
            f"{', '.join(missing[:3])}{more}: no such file; correct the name, or copy the missing "
            "files"
        )
    return paths


def is_tar_pattern(source: str) -> bool:
    """Return whether ``source`` names tar files rather than a folder of them."""
    return source.lower().endswith(".tar") and (
        bool(_BRACES.search(source)) or not storage.is_folder(source)
    )


def expand_braces(pattern: str) -> list[str]:
    """Expand braces as a shell does: ``a-{08..10}-{x,y}`` -> ``a-08-x``, ``a-08-y``, ``a-09-x`` …

    Raises:
        UserError: braces hold neither a list nor an ascending range.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = match[1]
    if limits := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(limits[1]), int(limits[2])
        padded = limits[1].startswith("0") or limits[2].startswith("0")
        width = max(len(limits[1]), len(limits[2])) if padded else 0
        choices = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        choices = inside.split(",")
    if not choices or (len(choices) == 1 and not limits):
        raise UserError(
            f"{pattern}: {{{inside}}} is neither a range such as {{0000..1023}} nor a list"
        )
    before, after = pattern[: match.start()], expand_braces(pattern[match.end() :])
    return [before + choice + rest for choice in choices for rest in after]


class DamagedTarError(Exception):
    """A file is not a tar file, or is incomplete."""


@dataclass
class TarSample:
    """A sample in a tar file.

    Attributes:
        key: common name of its members.
        extensions: of its members.
        label: text of its ``.cls`` member.
        image: bytes of its image, if they were read.
        offset: of the image in the tar, in bytes.
        size: of the image, in bytes.
        repeated: an earlier sample has the same key.
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
        """Whether a member has the extension of an image."""
        return any(extension in IMAGE_EXTENSIONS for extension in self.extensions)

    def fault(self) -> str | None:
        """Return why the sample cannot be used, or None if it can."""
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
    """Return the decimal label of a ``.cls`` member; None if it is not one."""
    stripped = text.strip()
    return int(stripped) if stripped.isdigit() and len(stripped) < 10 else None


def read_samples(file: HashingReader) -> Iterator[TarSample]:
    """Yield the samples of a tar with their images, in one sequential pass.

    Raises:
        DamagedTarError: the tar is damaged; the complete samples before are yielded first.
    """
    return _samples(cast(BinaryIO, file), "r|", file.block_at, with_images=True)


def scan_samples(file: BinaryIO) -> Iterator[TarSample]:
    """Yield the samples of a tar without their images, which are not read if ``file`` can seek.

    Raises:
        DamagedTarError: the tar is damaged; the complete samples before are yielded first.
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
                # tarfile would keep all headers: more than 1 GB for a million members.
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
                raise DamagedTarError(f"truncated, or garbage, at byte {tar.offset:,}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DamagedTarError(str(error)) from None


def _key_and_extension(member: tarfile.TarInfo) -> tuple[str, str]:
    """Return ``("folder/name", "ext")`` of a file; empty strings if it is not part of a sample."""
    folder, slash, name = member.name.rpartition("/")
    stem, dot, extension = name.partition(".")
    # The bytes of a sparse file are not contiguous, so no range read could return them.
    if not member.isreg() or member.issparse() or not stem or not dot:
        return "", ""
    return folder + slash + stem, extension.lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "only called for regular files"
    return file.read()


class HashingReader:
    """Wraps a file that is read sequentially; counts the bytes and computes checksums.

    Args:
        file: to read from.
        checksums: compute ``sha256`` and ``md5``.
    """

    def __init__(self, file: BinaryIO, checksums: bool = True) -> None:
        self._file = file
        self._checksums = checksums
        self._last = b""
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False)

    def read(self, length: int = -1) -> bytes:
        """Return the next ``length`` bytes; fewer only at the end."""
        content = self._file.read(length)
        if self._checksums:
            self.sha256.update(content)
            self.md5.update(content)
        self.position += len(content)
        self._last = content or self._last
        return content

    def block_at(self, position: int) -> bytes:
        """Return the part of a tar block that was in the last read; empty if none was."""
        start = position - (self.position - len(self._last))
        return self._last[start : start + tarfile.BLOCKSIZE] if start >= 0 else b""

    def drain(self) -> None:
        """Read to the end of the file."""
        while self.read(1 << 20):
            pass
