"""Which sample stands in which row of which step: a pure function, so resuming is arithmetic.

An epoch is put in order three times over. Blocks of neighbouring samples are permuted as wholes;
the sequence that results is cut into equal streams, and every step takes the next few samples of
every stream; inside a stream, windows of a few blocks are permuted sample by sample. The streams
depend on the global batch size alone, never on the machines: a host or a worker owns a range of
rows, hence of streams, and reads a few blocks at a time instead of single samples from everywhere.

Blocks exist for reading speed only. A small data set gets blocks of one sample, and so a full
permutation; a large one gets blocks short enough to keep many thousands of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rae_xla.data.counter import Purpose, counter_hash
from rae_xla.errors import UserError

Ids = NDArray[np.int64]
WindowName = tuple[int, int, int]
"""Epoch, stream, number."""

MANY_BLOCKS = 1 << 14
"""Blocks wanted at least; a set of up to twice as many samples is permuted sample by sample."""

BLOCK_BYTES = 8 << 20
"""Blocks need not be larger: at 8 MiB a read from a bucket is bound by bandwidth, not latency."""

STREAMS = 64
"""Up to this many hosts times workers can each read streams of their own."""

WINDOW_BLOCKS = 4
SMALLEST_WINDOW = 256
"""A window spans so many blocks and no fewer samples than this."""


def block_size(num_samples: int, num_bytes: int) -> int:
    """Samples per block for a data set of so many samples and bytes."""
    by_bytes = BLOCK_BYTES * num_samples // max(num_bytes, 1)
    return max(1, min(num_samples // MANY_BLOCKS, by_bytes))


@dataclass(frozen=True)
class SampleOrder:
    """The sample ids of every step of an endless run over ``num_samples`` samples.

    Epochs follow one another; each has ``num_samples // global_batch_size`` whole batches, and the
    few samples left over are others in every epoch. Without ``shuffle`` the ids simply count up.

    Raises:
        UserError: if there are fewer samples than one global batch holds.
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
        """Whole global batches in an epoch."""
        return self.num_samples // self.global_batch_size

    @property
    def streams(self) -> int:
        """How many streams an epoch is cut into: the divisor of the batch size nearest to 64."""
        return _nearest_divisor(self.global_batch_size)

    @property
    def window(self) -> int:
        """Samples in a window of a stream: fewer, the more windows are open at a time."""
        usual = max(SMALLEST_WINDOW, WINDOW_BLOCKS * self.block)
        return max(1, usual * STREAMS // max(STREAMS, self.streams))

    def epoch(self, step: int) -> int:
        """The epoch that global step ``step`` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def rows(self, step: int, first: int, last: int) -> Ids:
        """The sample ids of rows ``first:last`` of the global batch of ``step``."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if not self.shuffle:
            return step_in_epoch * self.global_batch_size + np.arange(first, last, dtype=np.int64)
        return np.concatenate([ids for _, ids in self._pieces(epoch, step_in_epoch, first, last)])

    def ahead(self, step: int, first: int, last: int) -> Iterator[tuple[WindowName, Ids]]:
        """What is best read at once by whoever makes rows ``first:last`` from ``step`` on.

        Yields:
            for every window that the rows of ``step`` come from, the samples that these rows still
            take from it, in no useful order, and a name that stays the same while the window does.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if not self.shuffle:
            yield (epoch, 0, step_in_epoch), self.rows(step, first, last)
            return
        per_step = self.global_batch_size // self.streams
        for place, _ in self._pieces(epoch, step_in_epoch, first, last):
            rest = place.ids[place.position :]
            rows = place.stream * per_step + (place.row + np.arange(len(rest))) % per_step
            yield (epoch, place.stream, place.number), rest[(rows >= first) & (rows < last)]

    def _pieces(
        self, epoch: int, step_in_epoch: int, first: int, last: int
    ) -> Iterator[tuple[_Place, Ids]]:
        """The same ids in pieces: one for every stream and window that the rows run through."""
        per_step = self.global_batch_size // self.streams
        while first < last:
            stream, row = divmod(first, per_step)
            position = step_in_epoch * per_step + row
            wanted = min(per_step - row, last - first)
            # Shifted from stream to stream, so that not all of them start a window at one step.
            shift = self.window * stream // self.streams
            number = (position + shift) // self.window
            start = max(0, number * self.window - shift)
            window = _window(self, epoch, stream, number, start)
            piece = window[position - start :][:wanted]
            yield _Place(stream, number, window, position - start, row), piece
            first += len(piece)


@dataclass(frozen=True, eq=False)
class _Place:
    """A position in a window's ``ids``, and the row of its stream that stands there."""

    stream: int
    number: int
    ids: Ids
    position: int
    row: int


@lru_cache(maxsize=64)
def _nearest_divisor(number: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d / STREAMS)))


@lru_cache(maxsize=1024)
def _window(order: SampleOrder, epoch: int, stream: int, number: int, start: int) -> Ids:
    """One window of a stream, from ``start`` in the stream to its end, in the order of use."""
    length = order.steps_per_epoch * (order.global_batch_size // order.streams)
    shift = order.window * stream // order.streams
    end = min(length, (number + 1) * order.window - shift)
    ids = _sequence(order, epoch, stream * length + start, stream * length + end)
    return ids[np.argsort(counter_hash(order.seed, Purpose.WINDOW, epoch, ids), kind="stable")]


def _sequence(order: SampleOrder, epoch: int, first: int, last: int) -> Ids:
    """Samples ``first:last`` of the epoch's permuted blocks laid end to end."""
    blocks, ends = _blocks(order, epoch)
    low = int(np.searchsorted(ends, first, side="right"))
    high = int(np.searchsorted(ends, last, side="left"))
    # All but the data set's last block are full, so ids past its end are simply left out.
    ids = (blocks[low : high + 1, None] * order.block + np.arange(order.block)).ravel()
    ids = ids[ids < order.num_samples]
    skipped = first - (int(ends[low - 1]) if low else 0)
    return ids[skipped : skipped + last - first]


@lru_cache(maxsize=8)  # two epochs of each of several sources
def _blocks(order: SampleOrder, epoch: int) -> tuple[Ids, Ids]:
    """The epoch's order of the blocks, and the number of samples up to the end of each."""
    count = -(-order.num_samples // order.block)
    numbers = np.arange(count, dtype=np.int64)
    hashes = counter_hash(order.seed, Purpose.BLOCK, epoch, numbers)
    blocks = numbers[np.argsort(hashes, kind="stable")]
    lengths = np.minimum(order.block, order.num_samples - blocks * order.block)
    return blocks, np.cumsum(lengths)
