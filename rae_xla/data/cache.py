"""Pieces of shards kept on a host's own disk or RAM disk, shared by all its processes.

``diskcache`` keeps the books (SQLite, one file a piece), evicts the pieces stored longest ago, and
survives processes that die in the middle of anything. A piece is named by its shard's content, so
runs on different copies of a data set share it, and no overwritten shard is ever served from here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import threading
from itertools import groupby
from typing import Any

from rae_xla.data import storage
from rae_xla.data.index import Shard
from rae_xla.errors import UserError

PIECE = 1 << 20
"""Bytes of a piece: little is read in vain around a sample, and a file costs no more than it."""

OWN_FOLDER = "rae_xla-pieces"
"""In the folder that is given; what else lies there is not touched."""

PATIENCE = 1.0
"""Seconds to wait for another process's lock: a bucket gives a piece in less."""

_opening = threading.Lock()


class RangeCache:
    """Reads ranges of shards through a folder of limited size; where it fails, without it.

    It pickles.

    Args:
        folder: on a local disk or RAM disk; made if missing. The pieces have one of their own in
            it.
        limit: bytes that the pieces may take up.
    """

    def __init__(self, folder: str, limit: int) -> None:
        if storage.is_remote(folder):
            raise UserError(f"data.cache_dir is {folder}; it must be a folder on a local disk")
        if limit < PIECE:
            raise UserError(f"data.cache_gb: {limit} bytes are too few; give some GB")
        self.folder, self.limit = folder, limit
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit": self.limit, "_opened": None}

    def prepare(self) -> None:
        """Make the folder and mend what a crash may have left in it; once, before it is shared.

        Raises:
            UserError: it cannot be used.
        """
        own = os.path.join(self.folder, OWN_FOLDER)
        try:
            os.makedirs(own, mode=0o700, exist_ok=True)
            try:
                self._mend()
            except sqlite3.OperationalError:
                raise  # the disk, not the books
            except sqlite3.DatabaseError:  # a crash of the machine: nothing here is the only copy
                self._opened = None
                shutil.rmtree(own)
                os.makedirs(own, mode=0o700)
                self._mend()
        except Exception as error:
            raise UserError(
                f"data.cache_dir {self.folder} cannot be used: {error or type(error).__name__}. "
                "Give a folder on a local disk, or leave data.cache_dir out"
            ) from error

    def _mend(self) -> None:
        pieces = self._pieces()
        pieces.check(fix=True)
        pieces.reset("size_limit", self.limit)
        pieces.cull()

    def read(
        self, shard: Shard, path: str, start: int, length: int, generation: str | None
    ) -> bytes:
        """``length`` bytes of a shard from ``start``; fewer only where it ends before.

        Raises:
            OSError: what is missing here cannot be read from ``path``.
        """
        pieces = {number: self._get(shard, number) for number in _numbers(start, length)}
        missing = [number for number, content in pieces.items() if content is None]
        for first, last in _stretches(missing):
            content = storage.read_range(path, first * PIECE, (last - first) * PIECE, generation)
            for number in range(first, last):
                piece = content[(number - first) * PIECE : (number - first + 1) * PIECE]
                pieces[number] = piece
                if len(piece) == min(PIECE, shard.bytes - number * PIECE):
                    self._put(shard, number, piece)
        whole = b"".join(piece for piece in pieces.values() if piece is not None)
        skipped = start % PIECE
        return whole[skipped : skipped + length]

    def forget(self, shard: Shard, start: int, length: int) -> None:
        """Drop what is kept of a range."""
        for number in _numbers(start, length):
            with contextlib.suppress(Exception):
                self._pieces().delete(_key(shard, number))

    def size(self) -> int:
        """Bytes that the pieces take up, with the books."""
        return int(self._pieces().volume())

    # Whatever goes wrong with a cache (a full disk, a lock, damaged books; diskcache's own errors
    # have no common base), the shard is there still.

    def _get(self, shard: Shard, number: int) -> bytes | None:
        with contextlib.suppress(Exception):
            content: bytes | None = self._pieces().get(_key(shard, number))
            return content
        return None

    def _put(self, shard: Shard, number: int, piece: bytes) -> None:
        with contextlib.suppress(Exception):
            self._pieces().set(_key(shard, number), piece)

    def _pieces(self) -> Any:
        with _opening:
            if self._opened is None:
                self._opened = _open(os.path.join(self.folder, OWN_FOLDER), self.limit)
            return self._opened


def _open(folder: str, limit: int) -> Any:
    import diskcache

    class BytesOnly(diskcache.Disk):
        """Never unpickles what somebody else may have put there."""

        def fetch(self, mode: int, *rest: Any) -> Any:
            if mode not in (diskcache.core.MODE_RAW, diskcache.core.MODE_BINARY):
                raise ValueError("not a piece of a shard")
            return super().fetch(mode, *rest)

    return diskcache.Cache(
        folder,
        timeout=PATIENCE,
        disk=BytesOnly,
        size_limit=limit,
        eviction_policy="least-recently-stored",  # a read need not write
        disk_min_file_size=0,
        sqlite_synchronous=0,  # a lost piece is read again
    )


def _key(shard: Shard, number: int) -> str:
    return f"{shard.sha256}/{number}"


def _numbers(start: int, length: int) -> range:
    """The pieces in which a range lies."""
    return range(start // PIECE, -(-(start + length) // PIECE))


def _stretches(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, past the last) of those that follow one another."""
    grouped = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    stretches = [[number for _, number in group] for _, group in grouped]
    return [(stretch[0], stretch[-1] + 1) for stretch in stretches]
