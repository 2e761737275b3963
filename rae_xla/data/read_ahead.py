"""Read samples before they are asked for: neighbours in one request, requests side by side.

Files on a local disk are left to the kernel, which is told what will be read and keeps it in its
page cache. From a bucket, a network file system (a gcsfuse mount too) or through a cache of ours,
threads fetch; they wait for the network and cost no core.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

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

MOST_HELD = 3 << 29
"""Bytes read ahead in each process: what one process alone needs for ImageNet, and some more."""


@dataclass(eq=False)
class Run:
    """Neighbouring samples of one shard, and the bytes from the first to the last of them.

    ``content`` is there once they are being read; ``wanted`` samples have not been taken yet.
    """

    shard: Shard
    samples: Ids
    start: int
    length: int
    content: Future[bytes] | None = None
    wanted: int = field(init=False)

    def __post_init__(self) -> None:
        self.wanted = len(self.samples)


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

    What is expected waits in a queue; ``REQUESTS`` of it are on their way at a time, as long as no
    more than ``MOST_HELD`` bytes are here that nobody has taken.

    Args:
        index: of the shards.
        cache: where ranges are kept on this host, if anywhere.
    """

    def __init__(self, index: ShardIndex, cache: RangeCache | None = None) -> None:
        self._index, self._cache = index, cache
        self._in_kernel = cache is None and storage.is_local_disk(index.folder)
        self._threads: ThreadPoolExecutor | None = None
        self._expected: dict[tuple[int, int], Run] = {}
        self._queue: deque[Run] = deque()
        self._lock = threading.Lock()
        self._underway = self._held = 0
        self._closed = False

    def expect(self, epoch: int, samples: Ids) -> None:
        """Begin to read ``samples``, which ``take`` will be asked for in ``epoch``."""
        for run in runs(self._index, samples):
            if self._in_kernel:
                storage.read_soon(self._index.path_of(run.shard), run.start, run.length)
                continue
            self._queue.append(run)
            for sample in run.samples.tolist():
                self._expected[epoch, sample] = run
        self._go_on()

    def take(self, epoch: int, sample: int, length: int) -> memoryview | None:
        """The ``length`` bytes of an expected sample, once; None if they were not read."""
        run = self._expected.pop((epoch, sample), None)
        if run is None:
            return None
        with self._lock:
            run.wanted -= 1
            content = run.content
            if content is not None and run.wanted == 0:
                self._held -= run.length
        self._go_on()
        if content is None:
            return None  # its turn had not come: one sample is read sooner than the run
        offset = int(self._index.samples["offset"][sample]) - run.start
        try:
            return memoryview(content.result())[offset : offset + length]
        except (OSError, CancelledError):
            return None  # whoever needs it reads it again, and finds out what is wrong with it

    def read(self, shard: Shard, start: int, length: int) -> bytes:
        """A range of a shard, from the cache if there is one.

        Raises:
            OSError: it cannot be read.
            CancelledError: it was closed.
        """
        if self._closed:
            raise CancelledError
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
        with self._lock:
            self._closed = True
            self._queue.clear()
        self._expected.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        """Send off what is next in the queue."""
        with self._lock:
            while (
                self._queue
                and not self._closed
                and self._underway < REQUESTS
                and self._held < MOST_HELD
            ):
                run = self._queue.popleft()
                if run.wanted == 0:  # all of it was read one by one, out of turn
                    continue
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(REQUESTS, "rae-xla-read")
                self._underway, self._held = self._underway + 1, self._held + run.length
                run.content = self._threads.submit(self._fetch, run)

    def _fetch(self, run: Run) -> bytes:
        try:
            return self.read(run.shard, run.start, run.length)
        finally:
            with self._lock:
                self._underway -= 1
            self._go_on()
