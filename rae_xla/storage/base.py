"""The interface of a file system, and what the implementations share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

TEMPORARY_MARK = ".tmp-"
"""Part of the name of every file that is still being written, and of no complete one."""


@dataclass(frozen=True)
class FileInfo:
    """What a listing reports about a file.

    Attributes:
        size: bytes.
        generation: version of an object in a bucket; None for other files.
        md5: MD5 checksum (hexadecimal), if the listing has one.
    """

    size: int
    generation: str | None = None
    md5: str | None = None


class FileSystem(Protocol):
    """Operations on full paths; ``rae_xla.storage`` documents each under the same name."""

    def open_read(self, path: str) -> BinaryIO:
        """Open a file for sequential reading."""
        ...

    def read_range(self, path: str, start: int, length: int, generation: str | None) -> bytes:
        """Read a byte range."""
        ...

    def create(self, path: str) -> AbstractContextManager[BinaryIO]:
        """Write a file atomically."""
        ...

    def exists(self, path: str) -> bool:
        """Return whether a file or folder exists."""
        ...

    def is_folder(self, path: str) -> bool:
        """Return whether a path is a folder."""
        ...

    def size(self, path: str) -> int:
        """Return the size of a file in bytes."""
        ...

    def list_files(self, folder: str) -> dict[str, FileInfo]:
        """List the files of a folder by name."""
        ...

    def list_folders(self, folder: str) -> list[str]:
        """List the names of the folders in a folder."""
        ...

    def make_folder(self, path: str) -> None:
        """Create a folder and its parents."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file."""
        ...
