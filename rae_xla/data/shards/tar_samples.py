"""Read the samples of a WebDataset tar, and account for all of its members and bytes.

A sample is a sequence of adjacent members whose names are equal up to the first dot. The
``webdataset`` package is not used for reading: it skips damaged samples, and gives no offsets.
``tarfile`` takes a tar that was cut between two members for a shorter one, garbage after a member
for its end, and ignores what follows the end; all are detected here, because a complete tar ends
with an empty block, and nothing but empty blocks follows.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, Literal, NamedTuple, cast

from rae_xla.data.image_decoding import IMAGE_EXTENSIONS, extension_of, unread_image_hint
from rae_xla.data.image_finder import HIDDEN, LeftOut
from rae_xla.data.shards.tar_faults import (
    BadEndError,
    DamagedTarError,
    OtherFileError,
    check_end,
    not_a_tar,
)

LABEL_EXTENSION = "cls"

READ_BYTES = 256 << 10
"""Bytes per read of a stream: enough that hashing and copying take the time, not the calls."""


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
        scattered: an earlier sample has the same key, and lacks members that this one has.
        elsewhere: its image or label is a link, or sparse: what it is.
    """

    key: str
    extensions: list[str] = field(default_factory=list)
    label: bytes | None = None
    image: bytes | None = None
    offset: int = 0
    size: int = 0
    repeated: bool = False
    scattered: bool = False
    elsewhere: str = ""

    def fault(self) -> str | None:
        """Return why the sample cannot be used, or None if it can."""
        images = [extension for extension in self.extensions if extension in IMAGE_EXTENSIONS]
        if self.repeated:
            return "the key appears a second time"
        if self.elsewhere:
            return self.elsewhere
        if not images:
            return f"the image is missing (there is only {self._members()}){self._hint()}"
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

    def _hint(self) -> str:
        """Return what to do if there is an image that is not taken."""
        if any(extension_of(f"x.{e}") in IMAGE_EXTENSIONS for e in self.extensions):
            return ": WebDataset ends the key at the first dot, so write names with one dot"
        hints = (unread_image_hint(extension) for extension in self.extensions)
        return next((f": {hint}" for hint in hints if hint is not None), "")


def parse_label(text: bytes) -> int | None:
    """Return the decimal label of a ``.cls`` member; None if it is not one."""
    stripped = text.strip()
    return int(stripped) if stripped.isdigit() and len(stripped) < 10 else None


def read_samples(file: HashingReader, left_out: LeftOut | None = None) -> Iterator[TarSample]:
    """Yield the samples of a tar with their images, in one sequential pass.

    Args:
        file: the tar; it is read to its end.
        left_out: gets the members that are not used.

    Raises:
        DamagedTarError: the tar is damaged; the complete samples before are yielded first.
    """
    return _samples(OpenTar(cast(BinaryIO, file), "r|", file.rest), left_out or LeftOut(), True)


def scan_samples(file: BinaryIO, left_out: LeftOut | None = None) -> Iterator[TarSample]:
    """Yield the samples of a tar without their images, which are not read if ``file`` can seek.

    Args:
        file: the tar.
        left_out: gets the members that are not used.

    Raises:
        DamagedTarError: the tar is damaged; the complete samples before are yielded first.
    """
    return _samples(_seekable(file), left_out or LeftOut(), False)


class ImageMember(NamedTuple):
    """An image in a tar: its name, and the offset and size of its bytes."""

    name: str
    offset: int
    size: int


def scan_images(file: BinaryIO, left_out: LeftOut) -> Iterator[ImageMember]:
    """Yield all images of a tar, whatever their names; their bytes are not read.

    Args:
        file: the tar.
        left_out: gets the members that are not images.

    Raises:
        DamagedTarError: the tar is damaged, or an image is a link; the images before are yielded
            first.
    """
    for _, member in read_members(_seekable(file), left_out):
        if extension_of(member.name.rpartition("/")[2]) not in IMAGE_EXTENSIONS:
            left_out.add_file(member.name)
        elif (elsewhere := why_no_bytes(member)) is not None:
            raise OtherFileError(f"{member.name}: {elsewhere}")
        else:
            yield ImageMember(member.name, member.offset_data, member.size)


def usable_samples(samples: Iterator[TarSample], faults: list[str]) -> Iterator[TarSample]:
    """Yield the samples that can be used, and add the faults of the others to ``faults``.

    Samples whose members are not next to each other, as in a tar that is not sorted, have one
    fault together.
    """
    of_key: dict[str, str] = {}
    scattered: dict[str, None] = {}
    try:
        for sample in samples:
            if (fault := sample.fault()) is None:
                yield sample
            elif sample.scattered:
                scattered[sample.key] = None
            else:
                of_key.setdefault(sample.key, fault)
    finally:
        if scattered:
            faults.append(
                f"the members of {len(scattered):,} samples (the first is {next(iter(scattered))}) "
                "are not next to each other: write the tar again with `tar --sort=name`"
            )
        faults += (f"sample {k}: {f}" for k, f in of_key.items() if k not in scattered)


class OpenTar(NamedTuple):
    """An open tar: the file, the mode for ``tarfile``, and what reads from an offset to the end."""

    file: BinaryIO
    mode: Literal["r|", "r:"]
    rest: Callable[[int], Iterator[bytes]]


def _seekable(file: BinaryIO) -> OpenTar:
    if not file.seekable():
        forward = HashingReader(file, checksums=False)
        return OpenTar(cast(BinaryIO, forward), "r|", forward.rest)

    def rest(position: int) -> Iterator[bytes]:
        file.seek(position)
        while content := file.read(READ_BYTES):
            yield content

    return OpenTar(file, "r:", rest)


def _samples(tar: OpenTar, left_out: LeftOut, with_images: bool) -> Iterator[TarSample]:
    keys = _Keys()
    current: TarSample | None = None
    bad_end: BadEndError | None = None
    try:
        for archive, member in read_members(tar, left_out):
            if not (key := key_and_extension(member.name)[0]):
                left_out.add_file(member.name)
                continue
            if current is None or key != current.key:
                if current is not None:
                    yield keys.compare(current)
                current = TarSample(key)
            _add_member(current, archive, member, left_out, with_images)
    except BadEndError as error:
        bad_end = error
    if current is not None:
        yield keys.compare(current)
    if bad_end is not None:
        raise bad_end


class _Keys:
    """The keys of the samples so far, and the extensions of their members."""

    def __init__(self) -> None:
        self._extensions: dict[str, frozenset[str]] = {}
        self._shared: dict[frozenset[str], frozenset[str]] = {}  # a million equal sets are one

    def compare(self, sample: TarSample) -> TarSample:
        """Set whether a complete sample repeats an earlier key, add its own, and return it."""
        before = self._extensions.get(sample.key, frozenset())
        sample.repeated = bool(before)
        sample.scattered = (
            bool(before) and not _is_complete(before) and before.isdisjoint(sample.extensions)
        )
        both = before.union(sample.extensions)
        self._extensions[sample.key] = self._shared.setdefault(both, both)
        return sample


def _is_complete(extensions: frozenset[str]) -> bool:
    return LABEL_EXTENSION in extensions and not extensions.isdisjoint(IMAGE_EXTENSIONS)


def _add_member(
    sample: TarSample,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    left_out: LeftOut,
    with_images: bool,
) -> None:
    """Add a member to its sample, with its content if it is a label or ``with_images``."""
    extension = key_and_extension(member.name)[1]
    elsewhere = why_no_bytes(member)
    sample.extensions.append(extension)
    if extension != LABEL_EXTENSION and extension not in IMAGE_EXTENSIONS:
        left_out.add_file(member.name)
    elif elsewhere is not None:
        sample.elsewhere = f"its .{extension} {elsewhere}"
    elif extension == LABEL_EXTENSION:
        sample.label = member_content(archive, member)
    else:
        sample.offset, sample.size = member.offset_data, member.size
        if with_images:
            sample.image = member_content(archive, member)


def read_members(
    tar: OpenTar, left_out: LeftOut
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the files and links of a tar that are not hidden, and check that it ends correctly."""
    try:
        with tarfile.open(fileobj=tar.file, mode=tar.mode, bufsize=READ_BYTES) as archive:
            for member in archive:
                # tarfile would keep all headers: more than 1 GB for a million members.
                archive.members = []  # type: ignore[attr-defined]
                parts = member.name.split("/")
                if any(part.startswith(".") and part not in (".", "..") for part in parts):
                    left_out.add(HIDDEN, member.name)
                elif member.isreg() or member.islnk() or member.issym():
                    yield archive, member
                elif not member.isdir():
                    left_out.add("special member", member.name)
            check_end(tar.rest(archive.offset), archive.offset)
    except tarfile.ReadError as error:
        raise not_a_tar(next(tar.rest(0), b""), error) from None
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DamagedTarError(str(error)) from None


def key_and_extension(path: str) -> tuple[str, str]:
    """Return ``("folder/name", "ext")`` of a file; empty strings if it is not part of a sample."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def why_no_bytes(member: tarfile.TarInfo) -> str | None:
    """Return why a member has no bytes of its own that can be read as one range, if it has not."""
    if member.islnk():
        return f"is a hard link to {member.linkname}: write the tar with `--hard-dereference`"
    if member.issym():
        return f"is a symbolic link to {member.linkname}: write the tar with `--dereference`"
    return "is a sparse member: write the tar without `--sparse`" if member.issparse() else None


def member_content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        DamagedTarError: the tar ends before.
    """
    file = tar.extractfile(member)
    assert file is not None, "only called for regular files"
    try:
        return file.read()
    except tarfile.TarError as error:
        raise DamagedTarError(f"{member.name}: {error}") from None


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

    def rest(self, position: int) -> Iterator[bytes]:
        """Yield the content from ``position``, which the last read must have reached, to the end.

        If that read began after ``position``, nothing is yielded.
        """
        start = position - (self.position - len(self._last))
        if start < 0:
            return
        if held := self._last[start:]:
            yield held
        while content := self.read(1 << 20):
            yield content

    def drain(self) -> None:
        """Read to the end of the file."""
        while self.read(1 << 20):
            pass
