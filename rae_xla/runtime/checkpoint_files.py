"""The files of a sharded checkpoint: where they are written, and what each must be."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO, Protocol

METADATA = ".metadata"
"""DCP's table of all shards."""

THREADS = 8
"""Files written, or ranges read, at a time: a bucket gives one of them some 100 MB/s."""


class Files(Protocol):
    """A folder, wherever it is."""

    def create(self, name: str) -> AbstractContextManager[BinaryIO]:
        """Write a file that is there, whole, when the block ends, and else is not."""
        ...

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """A part of a file."""
        ...

    def read_bytes(self, name: str) -> bytes:
        """All of a file."""
        ...


@dataclass(frozen=True)
class FileFacts:
    """What a file must be: its bytes, and their SHA-256 in hexadecimal digits."""

    size: int
    sha256: str
