"""Faults of tar files, by their first bytes and by what follows their end."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator

_MAGIC = {
    b"\x1f\x8b": "compressed with gzip: decompress it",
    b"BZh": "compressed with bzip2: decompress it",
    b"\xfd7zXZ": "compressed with xz: decompress it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: decompress it",
    b"PK\x03\x04": "a zip file: unpack it",
    b"version https://git-lfs": "a pointer of Git LFS: run `git lfs pull`",
}
"""First bytes of files that may be taken for a tar -> what they are, and what to do."""


class DamagedTarError(Exception):
    """A file is not a tar file, is incomplete, or has more than one archive in it.

    Attributes:
        remedy: what to do, if the message itself does not say so.
    """

    remedy = ": copy it again"

    def describe(self, samples: int) -> str:
        """Return the fault of a tar of which this many samples could be read."""
        return f"not a complete tar after {samples} samples ({self})"


class OtherFileError(DamagedTarError):
    """The file is something else, or has a member that cannot be used."""

    remedy = ""

    def describe(self, samples: int) -> str:
        """See ``DamagedTarError``."""
        return str(self)


class BadEndError(DamagedTarError):
    """All members before the end could be read."""


class MoreDataError(BadEndError):
    """There is something after the end of the archive."""

    remedy = ""

    def describe(self, samples: int) -> str:
        """See ``DamagedTarError``."""
        return f"{self} ({samples} samples before it)"


def tar_fault(error: DamagedTarError | OSError, samples: int) -> str:
    """Return why reading a tar ended after this many samples, and what to do."""
    if isinstance(error, DamagedTarError):
        return error.describe(samples) + error.remedy
    return f"cannot be read after {samples} samples ({error})"


def not_a_tar(head: bytes, error: Exception) -> DamagedTarError:
    """Return why ``tarfile`` cannot read a file that begins with these bytes."""
    if not head and "empty" in str(error):
        return DamagedTarError("the file is empty")
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            return OtherFileError(f"it is not a plain tar, but {kind}")
    return DamagedTarError(str(error))


def check_end(rest: Iterator[bytes], position: int) -> None:
    """Raise unless ``rest``, from the end mark at ``position`` on, has only empty blocks."""
    content = b""
    while len(content) < tarfile.BLOCKSIZE and (part := next(rest, b"")):
        content += part
    if content[: tarfile.BLOCKSIZE] != bytes(tarfile.BLOCKSIZE):
        raise BadEndError(f"truncated, or garbage, at byte {position:,}")
    while content:
        if found := content.lstrip(b"\0"):
            first = position + len(content) - len(found)
            tar = found[257:262] == b"ustar"
            kind = "another tar, as after `cat a.tar b.tar`," if tar else "data"
            raise MoreDataError(
                f"{kind} after the end of the archive, at byte {first:,}: join tars with "
                "`tar --concatenate`, or keep them as separate files"
            )
        position += len(content)
        content = next(rest, b"")
