"""Read samples before they are asked for: neighbours in one request, requests side by side.

Files on a local disk are left to the kernel, which is told what will be read and keeps it in its
page cache. From a bucket, a network file system (a gcsfuse mount too) or through a cache of ours,
threads fetch; they wait for the network and cost no core.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rae_xla.data import storage
from rae_xla.data.cache import RangeCache
from rae_xla.data.index import Shard, ShardIndex
from rae_xla.data.order import Ids

GAP = 64 << 10
"""Bytes between two samples that are rather read too than asked for in a request more."""

LONGEST = 8 << 20
"""Bytes of a request at most: from there on a bucket is bound by bandwidth, not by latency."""

REQUESTS = 32
"""Side by side in each process: at 50 ms each, 640 samples a second even one by one."""


@dataclass(frozen=True)
class Run:
    """Neighbouring samples of one shard, and the bytes from the first to the last of them."""

    shard: Shard
    samples: Ids
    start: int
    length: int


def runs(index: ShardIndex, samples: Ids) -> Iterator[Run]:
    """``samples`` (numbers in ``index``, in any order) as few ranges of bytes."""
    samples = np.unique(samples)
    rows = index.samples[samples]
    starts, ends = rows["offset"], rows["offset"] + rows["size"]
    shards = np.searchsorted(index.ends, samples, side="right")
    first = 0
    for last in range(1, len(samples) + 1):
        if (
            last < len(samples)
            and shards[last] == shards[first]
            and 0 <= starts[last] - ends[last - 1] <= GAP
            and ends[last] - starts[first] <= LONGEST
        ):
            continue
        length = int(ends[last - 1] - starts[first])
        yield Run(index.shards[shards[first]], samples[first:last], int(starts[first]), length)
        first = last


class ReadAhead:
    """The samples of one index that were expected, as far as they have been read.

    Args:
        index: of the shards.
        cache: where ranges are kept on this host, if anywhere.
    """

    def __init__(self, index: ShardIndex, cache: RangeCache | None = None) -> None:
        self._index, self._cache = index, cache
        self._in_kernel = cache is None and storage.is_local_disk(index.folder)
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[int, int], tuple[Future[bytes], int]] = {}

    def expect(self, epoch: int, samples: Ids) -> None:
        """Begin to read ``samples``, which ``take`` will be asked for in ``epoch``."""
        for run in runs(self._index, samples):
            if self._in_kernel:
                storage.read_soon(self._index.path_of(run.shard), run.start, run.length)
                continue
            if self._threads is None:
                self._threads = ThreadPoolExecutor(REQUESTS, "rae-xla-read")
            future = self._threads.submit(self.read, run.shard, run.start, run.length)
            for sample, offset in zip(
                run.samples.tolist(),
                self._index.samples["offset"][run.samples].tolist(),
                strict=True,
            ):
                self._coming[epoch, sample] = future, offset - run.start

    def take(self, epoch: int, sample: int, length: int) -> memoryview | None:
        """The ``length`` bytes of an expected sample, once; None if they could not be read."""
        future, start = self._coming.pop((epoch, sample), (None, 0))
        if future is None:
            return None
        try:
            return memoryview(future.result())[start : start + length]
        except OSError:
            return None  # whoever needs it reads it again, and finds out what is wrong with it

    def read(self, shard: Shard, start: int, length: int) -> bytes:
        """A range of a shard, from the cache if there is one.

        Raises:
            OSError: it cannot be read.
        """
        path, generation = self._index.path_of(shard), self._index.generations.get(shard.file)
        if self._cache is None:
            return storage.read_range(path, start, length, generation)
        return self._cache.read(shard, path, start, length, generation)

    def read_anew(self, shard: Shard, start: int, length: int) -> bytes:
        """A range from where the shard lies, in place of what a cache may hold of it.

        Raises:
            OSError: it cannot be read.
        """
        if self._cache is not None:
            self._cache.forget(shard, start, length)
        return self.read(shard, start, length)

    def close(self) -> None:
        """Give up what has not been read yet."""
        self._coming.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
