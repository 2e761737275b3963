"""A disk cache for byte ranges of shards, shared by all processes of a host.

``diskcache`` keeps the entries (SQLite, and one file per piece), evicts those stored longest ago,
and survives processes that are killed at any moment. Pieces are keyed by the content of their
shard: runs on different copies of a data set share them, and an overwritten shard never matches.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from itertools import groupby
from typing import Any, Protocol

from rae_xla import storage
from rae_xla.errors import UserError

PIECE_BYTES = 1 << 20
"""Size of a piece: reads little that is not needed around a sample, and opening a file costs no
more than reading it."""

SUBFOLDER = "rae_xla-pieces"
"""Holds the pieces within the configured folder, whose other content is not touched."""

LOCK_TIMEOUT = 1.0
"""Seconds to wait for another process's lock: a bucket delivers a piece in less."""


class HashedFile(Protocol):
    """A file of known content, such as a shard of an index."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the content (hexadecimal)."""
        ...

    @property
    def bytes(self) -> int:
        """Size of the file."""
        ...


class RangeCache:
    """Reads byte ranges of files through a folder of limited size.

    Where the cache itself fails (a full disk, a lock, a damaged database), the file is read
    directly. The object pickles, so that worker processes can share the folder.

    Args:
        folder: on a local disk or RAM disk; created if missing. The pieces are in a subfolder.
        limit: maximum number of bytes of all pieces.

    Raises:
        UserError: the folder is remote, or the limit too small.
    """

    def __init__(self, folder: str, limit: int) -> None:
        if storage.is_remote(folder):
            raise UserError(f"data.cache_dir is {folder}; it must be a folder on a local disk")
        if limit < PIECE_BYTES:
            raise UserError(f"data.cache_gb: {limit} bytes are too few; give some GB")
        self.folder, self.limit = folder, limit
        self._lock = threading.Lock()
        self._opened: Any = None

    def __reduce__(self) -> tuple[type[RangeCache], tuple[str, int]]:
        return RangeCache, (self.folder, self.limit)

    def prepare(self) -> None:
        """Create the folder and repair what a crash may have damaged; call it before sharing.

        Raises:
            UserError: the folder cannot be used.
        """
        subfolder = os.path.join(self.folder, SUBFOLDER)
        try:
            os.makedirs(subfolder, mode=0o700, exist_ok=True)
            try:
                self._repair()
            except sqlite3.OperationalError:
                raise  # the disk is at fault, not the database
            except sqlite3.DatabaseError:  # the machine crashed; nothing here is the only copy
                self._opened = None
                shutil.rmtree(subfolder)
                os.makedirs(subfolder, mode=0o700)
                self._repair()
        except Exception as error:
            raise UserError(
                f"data.cache_dir {self.folder} cannot be used: {error or type(error).__name__}. "
                "Give a folder on a local disk, or remove data.cache_dir"
            ) from error

    def _repair(self) -> None:
        database = self._database()
        database.check(fix=True)
        database.reset("size_limit", self.limit)
        database.cull()

    def read(
        self, file: HashedFile, path: str, start: int, length: int, generation: str | None
    ) -> bytes:
        """Return ``length`` bytes of a file from ``start``, or fewer if the file ends before.

        Args:
            file: identifies the content.
            path: where to read what is not in the cache.
            start: offset of the first byte.
            length: number of bytes.
            generation: of the object at ``path``; see ``storage.read_range``.

        Raises:
            OSError: a part that is not in the cache cannot be read from ``path``.
        """
        pieces = {number: self._get(file, number) for number in _piece_numbers(start, length)}
        missing = [number for number, content in pieces.items() if content is None]
        for first, last in _consecutive(missing):
            content = storage.read_range(
                path, first * PIECE_BYTES, (last - first) * PIECE_BYTES, generation
            )
            for number in range(first, last):
                begin = (number - first) * PIECE_BYTES
                piece = pieces[number] = content[begin : begin + PIECE_BYTES]
                if len(piece) == min(PIECE_BYTES, file.bytes - number * PIECE_BYTES):
                    self._put(file, number, piece)
        joined = b"".join(piece for piece in pieces.values() if piece is not None)
        skipped = start % PIECE_BYTES
        return joined[skipped : skipped + length]

    def discard(self, file: HashedFile, start: int, length: int) -> None:
        """Remove the pieces of a byte range."""
        for number in _piece_numbers(start, length):
            with contextlib.suppress(Exception):
                self._database().delete(_key(file, number))

    def size(self) -> int:
        """Return the bytes of all pieces and of the database."""
        return int(self._database().volume())

    # diskcache's exceptions have no common base, and no failure of the cache may stop a run.

    def _get(self, file: HashedFile, number: int) -> bytes | None:
        with contextlib.suppress(Exception):
            content: bytes | None = self._database().get(_key(file, number))
            return content
        return None

    def _put(self, file: HashedFile, number: int, piece: bytes) -> None:
        with contextlib.suppress(Exception):
            self._database().set(_key(file, number), piece)

    def _database(self) -> Any:
        with self._lock:
            if self._opened is None:
                self._opened = _open_database(os.path.join(self.folder, SUBFOLDER), self.limit)
            return self._opened


def _open_database(folder: str, limit: int) -> Any:
    import diskcache

    class BytesOnly(diskcache.Disk):
        """Refuses to unpickle, because other users may have written to the folder."""

        def fetch(self, mode: int, *rest: Any) -> Any:
            if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY):
                raise ValueError("not a piece of a shard")
            return super().fetch(mode, *rest)

    return diskcache.Cache(
        folder,
        timeout=LOCK_TIMEOUT,
        disk=BytesOnly,
        size_limit=limit,
        eviction_policy="least-recently-stored",  # so that reads do not write
        disk_min_file_size=0,
        sqlite_synchronous=0,  # a lost piece is read again
    )


def _key(file: HashedFile, number: int) -> str:
    return f"{file.sha256}/{number}"


def _piece_numbers(start: int, length: int) -> range:
    """Return the numbers of the pieces that a byte range overlaps."""
    return range(start // PIECE_BYTES, -(-(start + length) // PIECE_BYTES))


def _consecutive(numbers: list[int]) -> list[tuple[int, int]]:
    """Group ascending numbers into half-open ranges (first, last + 1) without gaps."""
    grouped = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ranges = [[number for _, number in group] for _, group in grouped]
    return [(numbers[0], numbers[-1] + 1) for numbers in ranges]
