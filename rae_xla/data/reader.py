"""Reading single samples: read-ahead, checksum, decoding and transform.

``ReadAhead`` loads samples before they are needed: adjacent ones in one request, many requests at
once. For files on a local disk it only advises the kernel, which keeps them in its page cache. From
a bucket, a network file system (a gcsfuse mount included) or through a ``RangeCache``, threads
read; they wait for the network and need no core.
"""

from __future__ import annotations

import errno
import threading
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from rae_xla import storage
from rae_xla.data.bad_samples import SampleError
from rae_xla.data.image_decoding import ImageError, open_image
from rae_xla.data.sampler import SampleIds
from rae_xla.data.shards.index import Shard, ShardIndex
from rae_xla.data.transforms import Pixels, Transform
from rae_xla.errors import UserError
from rae_xla.storage.cache import RangeCache

MAX_GAP = 64 << 10
"""Bytes between two samples that are read along rather than skipped with a second request."""

MAX_REQUEST_BYTES = 8 << 20
"""From this size on, a bucket is bound by bandwidth rather than latency."""

MAX_REQUESTS = 32
"""Concurrent requests of a process: at 50 ms each, 640 samples per second even one by one."""

MAX_HELD_BYTES = 3 << 29
"""Bytes read ahead per process: what a single process needs for ImageNet, and some more."""

MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Too many open files, no memory: faults of the machine and not of a sample."""


class SampleReader:
    """Reads the samples of one index, for one thread.

    Args:
        index: of the shards.
        cache: disk cache of this host, if any.
    """

    def __init__(self, index: ShardIndex, cache: RangeCache | None = None) -> None:
        self.index = index
        self._ahead = ReadAhead(index, cache)

    def read_ahead(self, epoch: int, samples: SampleIds) -> None:
        """Start to read samples that ``load`` will request in ``epoch``."""
        self._ahead.start(epoch, samples)

    def load(self, epoch: int, sample: int, transform: Transform, u: Sequence[float]) -> Pixels:
        """Return the transformed pixels (H, W, 3) of a sample.

        Args:
            epoch: as given to ``read_ahead``.
            sample: number of the sample.
            transform: see ``transforms``.
            u: two uniforms in [0, 1) for the transform.

        Raises:
            SampleError: the sample cannot be read or decoded; names the shard and the sample.
        """
        content = self.encoded(epoch, sample)
        try:
            with open_image(content) as image:
                return np.asarray(transform(image, u))
        except ImageError as error:
            path = self.index.path_of(self.index.shard_of(sample))
            raise SampleError(
                f"{path}: the image of sample {sample} does not decode ({error})",
                "make the shards again without it",
            ) from None

    def encoded(self, epoch: int, sample: int) -> bytes | memoryview:
        """Return the encoded image of a sample.

        Raises:
            SampleError: the bytes cannot be read, or are not those that were indexed.
        """
        row = self.index.samples[sample]
        length, crc32 = int(row["size"]), int(row["crc32"])
        ahead = self._ahead.take(epoch, sample, length)
        if ahead is not None and len(ahead) == length and zlib.crc32(ahead) == crc32:
            return ahead
        shard, offset = self.index.shard_of(sample), int(row["offset"])
        fault, unreachable = "", False
        # If the cache holds wrong bytes, the second attempt reads the shard itself.
        for read in (self._ahead.read, self._ahead.read_uncached):
            try:
                content = read(shard, offset, length)
            except FileNotFoundError:
                fault = f"sample {sample} is gone: the shard has disappeared or was overwritten"
                continue
            except OSError as error:
                if isinstance(error, PermissionError) or error.errno in MACHINE_ERRORS:
                    raise UserError(f"{self.index.path_of(shard)}: {error}") from error
                fault, unreachable = f"sample {sample} cannot be read: {error}", True
                break  # storage has retried already
            if len(content) != length:
                fault = (
                    f"the shard is truncated: it ends before byte {offset + length}, where sample "
                    f"{sample} ends (the index lists {shard.bytes} bytes)"
                )
            elif zlib.crc32(content) != crc32:
                fault = (
                    f"sample {sample} was changed after the index was written (its checksum "
                    "differs)"
                )
            else:
                return content
        raise SampleError(
            f"{self.index.path_of(shard)}: {fault}",
            "copy the shard again and start again",
            unreachable=unreachable,
        )

    def close(self) -> None:
        """Cancel the read-ahead."""
        self._ahead.close()


def read_image(index: ShardIndex, sample: int) -> bytes:
    """Return the encoded image of one sample; see ``SampleReader.encoded``."""
    return bytes(SampleReader(index).encoded(0, sample))


def load_sample(index: ShardIndex, sample: int, transform: Transform, u: Sequence[float]) -> Pixels:
    """Return the transformed pixels (H, W, 3) of one sample; see ``SampleReader.load``."""
    return SampleReader(index).load(0, sample, transform, u)


@dataclass(eq=False)
class ReadRequest:
    """One read: a byte range of a shard that holds adjacent samples.

    Attributes:
        shard: of the samples.
        samples: their numbers, ascending.
        start: offset of the first byte in the shard.
        length: bytes from the first to the last sample.
        content: the bytes, once a thread reads them.
        pending: number of samples that have not been taken yet.
    """

    shard: Shard
    samples: SampleIds
    start: int
    length: int
    content: Future[bytes] | None = None
    pending: int = field(init=False)

    def __post_init__(self) -> None:
        self.pending = len(self.samples)


def read_requests(index: ShardIndex, samples: SampleIds) -> Iterator[ReadRequest]:
    """Cover ``samples`` (numbers in ``index``, in any order) with few requests."""
    samples = np.unique(samples)
    rows = index.samples[samples]
    starts, ends = rows["offset"], rows["offset"] + rows["size"]
    shards = np.searchsorted(index.ends, samples, side="right")
    first = 0
    for last in range(1, len(samples) + 1):
        if (
            last < len(samples)
            and shards[last] == shards[first]
            and 0 <= starts[last] - ends[last - 1] <= MAX_GAP
            and ends[last] - starts[first] <= MAX_REQUEST_BYTES
        ):
            continue
        length = int(ends[last - 1] - starts[first])
        shard = index.shards[shards[first]]
        yield ReadRequest(shard, samples[first:last], int(starts[first]), length)
        first = last


class ReadAhead:
    """Reads announced samples of one index in the background.

    Requests wait in a queue; up to ``MAX_REQUESTS`` run at once, while fewer than
    ``MAX_HELD_BYTES`` bytes have been read and not taken.

    Args:
        index: of the shards.
        cache: disk cache of this host, if any.
    """

    def __init__(self, index: ShardIndex, cache: RangeCache | None = None) -> None:
        self._index, self._cache = index, cache
        self._by_kernel = cache is None and storage.is_local_disk(index.folder)
        self._threads: ThreadPoolExecutor | None = None
        self._by_sample: dict[tuple[int, int], ReadRequest] = {}
        self._queue: deque[ReadRequest] = deque()
        self._lock = threading.Lock()
        self._running = self._held = 0
        self._closed = False

    def start(self, epoch: int, samples: SampleIds) -> None:
        """Start to read ``samples``, which ``take`` will request in ``epoch``."""
        for request in read_requests(self._index, samples):
            if self._by_kernel:
                path = self._index.path_of(request.shard)
                storage.advise_read(path, request.start, request.length)
                continue
            self._queue.append(request)
            for sample in request.samples.tolist():
                self._by_sample[epoch, sample] = request
        self._submit_queued()

    def take(self, epoch: int, sample: int, length: int) -> memoryview | None:
        """Return the ``length`` bytes of a sample, once; None if they have not been read."""
        request = self._by_sample.pop((epoch, sample), None)
        if request is None:
            return None
        with self._lock:
            request.pending -= 1
            content = request.content
            if content is not None and request.pending == 0:
                self._held -= request.length
        self._submit_queued()
        if content is None:
            return None  # still queued: reading the sample alone is faster
        offset = int(self._index.samples["offset"][sample]) - request.start
        try:
            return memoryview(content.result())[offset : offset + length]
        except (OSError, CancelledError):
            return None  # the caller reads the sample itself and reports what is wrong

    def read(self, shard: Shard, start: int, length: int) -> bytes:
        """Return a byte range of a shard, from the cache if there is one.

        Raises:
            OSError: the shard cannot be read.
            CancelledError: ``close`` was called.
        """
        if self._closed:
            raise CancelledError
        path, generation = self._index.path_of(shard), self._index.generations.get(shard.file)
        if self._cache is None:
            return storage.read_range(path, start, length, generation)
        return self._cache.read(shard, path, start, length, generation)

    def read_uncached(self, shard: Shard, start: int, length: int) -> bytes:
        """Return a byte range from the shard itself, and replace it in the cache.

        Raises:
            OSError: the shard cannot be read.
        """
        if self._cache is not None:
            self._cache.discard(shard, start, length)
        return self.read(shard, start, length)

    def close(self) -> None:
        """Cancel everything that has not been read."""
        with self._lock:
            self._closed = True
            self._queue.clear()
        self._by_sample.clear()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _submit_queued(self) -> None:
        """Start as many queued requests as the limits allow."""
        with self._lock:
            while (
                self._queue
                and not self._closed
                and self._running < MAX_REQUESTS
                and self._held < MAX_HELD_BYTES
            ):
                request = self._queue.popleft()
                if request.pending == 0:  # all its samples have been read one by one
                    continue
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(MAX_REQUESTS, "rae-xla-read")
                self._running, self._held = self._running + 1, self._held + request.length
                request.content = self._threads.submit(self._fetch, request)

    def _fetch(self, request: ReadRequest) -> bytes:
        try:
            return self.read(request.shard, request.start, request.length)
        finally:
            with self._lock:
                self._running -= 1
            self._submit_queued()
