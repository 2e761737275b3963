"""Local files, mounted network file systems included."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from rae_xla.storage.base import TEMPORARY_MARK, FileInfo

KERNEL_READ_AHEAD = 128 << 10
"""Bytes: the default read-ahead of Linux (``read_ahead_kb``)."""

NETWORK_FILE_SYSTEMS = ("fuse", "nfs", "cifs", "smb", "9p", "lustre", "ceph", "beegfs", "gpfs")
"""Prefixes of their types in the mount table; gcsfuse mounts are of type ``fuse.gcsfuse``."""


class LocalFiles:
    """The ``FileSystem`` of this machine."""

    def open_read(self, path: str) -> BinaryIO:
        """See ``storage.open_read``."""
        return open(path, "rb")

    def read_range(
        self, path: str, start: int, length: int, generation: str | None = None
    ) -> bytes:
        """See ``storage.read_range``; local files have no generations."""
        # Unbuffered: a buffered file would read 8 KiB more than requested.
        with open(path, "rb", buffering=0) as file:
            return _pread(file.fileno(), start, length)

    @contextlib.contextmanager
    def create(self, path: str) -> Iterator[BinaryIO]:
        """See ``storage.create``."""
        temporary = f"{path}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}"
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                # Without it a crash of the machine could leave an empty file of the final name.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            raise

    def exists(self, path: str) -> bool:
        """See ``storage.exists``."""
        return os.path.exists(path)

    def is_folder(self, path: str) -> bool:
        """See ``storage.is_folder``."""
        return os.path.isdir(path)

    def size(self, path: str) -> int:
        """See ``storage.size``."""
        return os.path.getsize(path)

    def list_files(self, folder: str) -> dict[str, FileInfo]:
        """See ``storage.list_files``."""
        with os.scandir(folder) as entries:
            return {e.name: FileInfo(e.stat().st_size) for e in entries if e.is_file()}

    def list_folders(self, folder: str) -> list[str]:
        """See ``storage.list_folders``."""
        try:
            with os.scandir(folder) as entries:
                return [e.name for e in entries if e.is_dir()]
        except FileNotFoundError:
            return []

    def make_folder(self, path: str) -> None:
        """See ``storage.make_folder``."""
        os.makedirs(path, exist_ok=True)

    def remove(self, path: str) -> None:
        """See ``storage.remove``."""
        os.remove(path)


def is_on_local_disk(path: str) -> bool:
    """Return whether a local path is on a disk of this machine, according to the mount table."""
    with contextlib.suppress(OSError, ValueError):
        device = os.stat(path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            for line in table:
                mount, _, kind = line.partition(" - ")
                if mount.split()[2] == number:
                    return not kind.startswith(NETWORK_FILE_SYSTEMS)
    return True


def advise_read(path: str, start: int, length: int) -> None:
    """Have the kernel load a byte range of a file into its page cache in the background."""
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        # One call loads no more than the kernel's read-ahead, which is usually this much.
        for first in range(start, start + length, KERNEL_READ_AHEAD):
            os.posix_fadvise(
                file.fileno(),
                first,
                min(KERNEL_READ_AHEAD, start + length - first),
                os.POSIX_FADV_WILLNEED,
            )


def _pread(descriptor: int, start: int, length: int) -> bytes:
    """Read a range; Linux returns at most 2 GiB per call and may return less."""
    first = os.pread(descriptor, length, start)
    if len(first) == length or not first:
        return first
    return first + _pread(descriptor, start + len(first), length - len(first))
