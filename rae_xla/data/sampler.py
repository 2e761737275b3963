"""The sampling order: which sample is in which row of which step, as a pure function.

Resuming a run is therefore arithmetic. An epoch is shuffled on three levels. Blocks of adjacent
samples are permuted; the resulting sequence is cut into streams of equal length, and every step
takes the next few samples of every stream; within a stream, windows of a few blocks are permuted
sample by sample. The streams depend on the global batch size, never on the machines: a host or a
worker owns a range of rows, hence of streams, and reads a few blocks at a time rather than single
samples from everywhere.

Blocks exist for reading speed only. A small data set gets blocks of one sample, hence a full
permutation; a large one gets blocks that are short enough for there to be many thousands of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rae_xla.data.counter_rng import Purpose, counter_hash
from rae_xla.errors import UserError

SampleIds = NDArray[np.int64]
WindowKey = tuple[int, int, int]
"""Epoch, stream, and number of the window within the stream."""

MIN_BLOCKS = 1 << 14
"""A data set of up to twice as many samples is permuted sample by sample."""

MAX_BLOCK_BYTES = 8 << 20
"""At 8 MiB, a read from a bucket is bound by bandwidth rather than latency."""

TARGET_STREAMS = 64
"""Up to this many hosts times workers can each read streams that no other reads."""

WINDOW_BLOCKS = 4
MIN_WINDOW = 256
"""A window spans ``WINDOW_BLOCKS`` blocks, and at least this many samples."""


def block_size(num_samples: int, num_bytes: int) -> int:
    """Return the samples per block for a data set of ``num_samples`` and ``num_bytes`` bytes."""
    by_bytes = MAX_BLOCK_BYTES * num_samples // max(num_bytes, 1)
    return max(1, min(num_samples // MIN_BLOCKS, by_bytes))


@dataclass(frozen=True)
class BatchSampler:
    """The sample ids of every global batch of an endless run.

    Every epoch has ``num_samples // global_batch_size`` full batches; which samples are left out is
    different in every epoch.

    Attributes:
        num_samples: size of the data set.
        global_batch_size: rows of a step over all processes.
        seed: of the order.
        block: samples per block; see ``block_size``.
        shuffle: if False, the ids count up.

    Raises:
        UserError: there are fewer samples than rows in a global batch.
    """

    num_samples: int
    global_batch_size: int
    seed: int = 0
    block: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise UserError(f"global_batch_size is {self.global_batch_size}; it must be at least 1")
        if self.num_samples < self.global_batch_size:
            raise UserError(
                f"the data set has {self.num_samples} samples, fewer than one global batch of "
                f"{self.global_batch_size}: lower training.global_batch_size or add data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch."""
        return self.num_samples // self.global_batch_size

    @property
    def streams(self) -> int:
        """Streams of an epoch: the divisor of the batch size nearest to ``TARGET_STREAMS``."""
        return _nearest_divisor(self.global_batch_size)

    @property
    def window(self) -> int:
        """Samples in a window of a stream; smaller where more than 64 windows are open at once."""
        usual = max(MIN_WINDOW, WINDOW_BLOCKS * self.block)
        return max(1, usual * TARGET_STREAMS // max(TARGET_STREAMS, self.streams))

    def epoch(self, step: int) -> int:
        """Return the epoch of global step ``step`` (from 0)."""
        return step // self.steps_per_epoch

    def sample_ids(self, step: int, first: int, last: int) -> SampleIds:
        """Return the sample ids of rows ``first:last`` of the global batch of ``step``."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if not self.shuffle:
            return step_in_epoch * self.global_batch_size + np.arange(first, last, dtype=np.int64)
        return np.concatenate([s.ids for s in self._slices(epoch, step_in_epoch, first, last)])

    def upcoming(self, step: int, first: int, last: int) -> Iterator[tuple[WindowKey, SampleIds]]:
        """Yield what a reader of rows ``first:last`` should read from ``step`` on.

        Yields:
            For every window that the rows of ``step`` come from: its key, which stays the same as
            long as the window is in use, and the samples (in no particular order) that these rows
            still take from it.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if not self.shuffle:
            yield (epoch, 0, step_in_epoch), self.sample_ids(step, first, last)
            return
        per_step = self.global_batch_size // self.streams
        for piece in self._slices(epoch, step_in_epoch, first, last):
            remaining = piece.window[piece.position :]
            row_in_stream = (piece.row + np.arange(len(remaining))) % per_step
            rows = piece.stream * per_step + row_in_stream
            yield piece.key, remaining[(rows >= first) & (rows < last)]

    def _slices(
        self, epoch: int, step_in_epoch: int, first: int, last: int
    ) -> Iterator[_WindowSlice]:
        """Yield rows ``first:last`` in pieces, one for every stream and window they come from."""
        per_step = self.global_batch_size // self.streams
        while first < last:
            stream, row = divmod(first, per_step)
            position = step_in_epoch * per_step + row
            count = min(per_step - row, last - first)
            # Shifted from stream to stream, so that they do not all start a window at one step.
            shift = self.window * stream // self.streams
            number = (position + shift) // self.window
            start = max(0, number * self.window - shift)
            window = _window(self, epoch, stream, number, start)
            ids = window[position - start :][:count]
            key = (epoch, stream, number)
            yield _WindowSlice(key, stream, row, window, position - start, ids)
            first += len(ids)


@dataclass(frozen=True, eq=False)
class _WindowSlice:
    """Rows of a step that come from one window.

    Attributes:
        key: of the window.
        stream: of the window.
        row: the first of the rows, counted within the stream's rows of a step.
        window: all sample ids of the window, in the order of use.
        position: of the first of the rows in ``window``.
        ids: the sample ids of the rows.
    """

    key: WindowKey
    stream: int
    row: int
    window: SampleIds
    position: int
    ids: SampleIds


@lru_cache(maxsize=64)
def _nearest_divisor(number: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / TARGET_STREAMS)))


@lru_cache(maxsize=1024)
def _window(sampler: BatchSampler, epoch: int, stream: int, number: int, start: int) -> SampleIds:
    """Return one window of a stream in the order of use; ``start`` is its position there."""
    length = sampler.steps_per_epoch * (sampler.global_batch_size // sampler.streams)
    shift = sampler.window * stream // sampler.streams
    end = min(length, (number + 1) * sampler.window - shift)
    ids = _sequence(sampler, epoch, stream * length + start, stream * length + end)
    return ids[np.argsort(counter_hash(sampler.seed, Purpose.WINDOW, epoch, ids), kind="stable")]


def _sequence(sampler: BatchSampler, epoch: int, first: int, last: int) -> SampleIds:
    """Return samples ``first:last`` of the concatenated permuted blocks of an epoch."""
    blocks, ends = _blocks(sampler, epoch)
    low = int(np.searchsorted(ends, first, side="right"))
    high = int(np.searchsorted(ends, last, side="left"))
    # All but the data set's last block are full, so ids past its end are simply left out.
    ids = (blocks[low : high + 1, None] * sampler.block + np.arange(sampler.block)).ravel()
    ids = ids[ids < sampler.num_samples]
    skipped = first - (int(ends[low - 1]) if low else 0)
    return ids[skipped : skipped + last - first]


@lru_cache(maxsize=8)  # two epochs of each of several sources
def _blocks(sampler: BatchSampler, epoch: int) -> tuple[SampleIds, SampleIds]:
    """Return the epoch's order of the blocks, and the samples up to the end of each."""
    count = -(-sampler.num_samples // sampler.block)
    numbers = np.arange(count, dtype=np.int64)
    hashes = counter_hash(sampler.seed, Purpose.BLOCK, epoch, numbers)
    blocks = numbers[np.argsort(hashes, kind="stable")]
    lengths = np.minimum(sampler.block, sampler.num_samples - blocks * sampler.block)
    return blocks, np.cumsum(lengths)
