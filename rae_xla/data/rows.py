"""The rows of a step: a pure function of the step, with NumPy and Pillow alone.

Torch is left out on purpose: worker processes import this module, and without torch they start in
a fraction of a second and weigh a tenth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rae_xla.data.cache import RangeCache
from rae_xla.data.counter import Purpose, uniform
from rae_xla.data.faults import (
    MOST_REPLACEMENTS,
    MOST_UNREACHABLE,
    BadSample,
    SampleError,
    replacement,
)
from rae_xla.data.index import ShardIndex
from rae_xla.data.order import Ids, SampleOrder, WindowName
from rae_xla.data.reader import SampleReader
from rae_xla.data.transforms import Pixels, Transform, flip
from rae_xla.errors import UserError

Arrays = dict[str, NDArray[Any]]
"""``image`` uint8 (b, 3, H, W), ``label`` and ``index`` int64 (b,), perhaps ``weight``."""

LOOK_AHEAD = 512
"""Samples a worker expects beyond those it is making: at 3,000 a second, 170 ms of them."""


class Made(NamedTuple):
    """The rows of a step, and the samples that had to be replaced in them."""

    arrays: Arrays
    bad: list[BadSample]


class Rows(Protocol):
    """Rows of steps, to be made in this process or in others: it pickles."""

    def open(self, first: int, last: int, look_ahead: int = LOOK_AHEAD) -> RowMaker:
        """Who makes rows ``first:last`` of any step, and reads so many samples ahead of steps in a
        row.
        """
        ...


class RowMaker(Protocol):
    """Makes the same rows of one step after another."""

    def make(self, step: int) -> Made:
        """The rows of a step."""
        ...

    def close(self) -> None:
        """Stop reading ahead."""
        ...


@dataclass(frozen=True, eq=False)
class Part:
    """Training data from one source: every step takes the same rows from it.

    Attributes:
        index: of its shards.
        order: of its samples, ``order.global_batch_size`` of them a step.
        first_row: where they stand in the global batch.
        first_id: what its sample numbers begin with, so that no two sources share one.
    """

    index: ShardIndex
    order: SampleOrder
    first_row: int = 0
    first_id: int = 0


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Shuffled, cropped and flipped; a bad sample is replaced by another."""

    parts: tuple[Part, ...]
    transform: Transform
    flip: bool
    cache: RangeCache | None = None

    def open(self, first: int, last: int, look_ahead: int = LOOK_AHEAD) -> RowMaker:
        """See ``Rows``."""
        return _TrainingMaker(self, first, last, look_ahead)


class _TrainingMaker:
    def __init__(self, rows: TrainingRows, first: int, last: int, look_ahead: int) -> None:
        self._transform, self._flip, self._count = rows.transform, rows.flip, last - first
        self._shares = list(_shares(rows, first, last, look_ahead))

    def make(self, step: int) -> Made:
        images = _Images(self._count)
        made = []
        for share in self._shares:
            share.look_ahead(step)
            made.append(self._make_share(share, step, images))
        ids, labels, bad = zip(*made, strict=True)
        arrays = {
            "image": images.array,
            "label": np.concatenate(labels),
            "index": np.concatenate(ids),
        }
        return Made(arrays, [sample for part in bad for sample in part])

    def _make_share(
        self, share: _Share, step: int, images: _Images
    ) -> tuple[Ids, NDArray[np.int64], list[BadSample]]:
        order = share.part.order
        bad: list[BadSample] = []
        seed, epoch = order.seed, order.epoch(step)
        ids = share.ids(step)
        crops = [uniform(seed, p, epoch, ids) for p in (Purpose.CROP_X, Purpose.CROP_Y)]
        flips = (uniform(seed, Purpose.FLIP, epoch, ids) < 0.5) & self._flip
        draws = zip(*(crop.tolist() for crop in crops), flips.tolist(), strict=True)
        for row, (sample, (across, down, flipped)) in enumerate(
            zip(ids.tolist(), draws, strict=True)
        ):
            pixels, ids[row] = self._load(share, step, epoch, sample, (across, down), bad)
            images.append(flip(pixels) if flipped else pixels)
        labels = share.part.index.samples["label"][ids].astype(np.int64)
        return ids + share.part.first_id, labels, bad

    def _load(
        self,
        share: _Share,
        step: int,
        epoch: int,
        sample: int,
        u: tuple[float, float],
        bad: list[BadSample],
    ) -> tuple[Pixels, int]:
        """The pixels of a sample, or of the one that stands in for it; and which it is."""
        index, seed, wanted = share.part.index, share.part.order.seed, sample
        in_a_row: list[BadSample] = []
        unreachable = 0
        for attempt in range(MOST_REPLACEMENTS + 1):
            try:
                pixels = share.reader.load(epoch, wanted, self._transform, u)
            except SampleError as error:
                instead = replacement(seed, epoch, sample, attempt, len(index))
                path = index.path_of(index.shard_of(wanted))
                offset = int(index.samples["offset"][wanted])
                in_a_row.append(BadSample(step, epoch, wanted, path, offset, error.reason, instead))
                wanted = instead
                unreachable += error.unreachable
                if unreachable == MOST_UNREACHABLE:
                    break
            else:
                bad += [dataclasses.replace(sample, replaced_by=wanted) for sample in in_a_row]
                return pixels, wanted
        raise UserError(
            f"{index.folder}: {len(in_a_row)} samples in a row cannot be used, so nothing can be "
            f"read: {in_a_row[0].reason}; {in_a_row[1].reason}; … Mend it and start the run again: "
            "it goes on from its last checkpoint"
        )

    def close(self) -> None:
        for share in self._shares:
            share.reader.close()


class _Share:
    """What one worker makes of a part: its rows ``first:last`` of those the part gives."""

    def __init__(
        self, part: Part, first: int, last: int, look_ahead: int, cache: RangeCache | None
    ) -> None:
        self.part, self._first, self._last = part, first, last
        self.reader = SampleReader(part.index, cache)
        self._steps_ahead = -(-look_ahead // (last - first))
        self._next_step = -1
        # Windows, and the last step that each is known to serve.
        self._expected: dict[WindowName, int] = {}

    def ids(self, step: int) -> Ids:
        """Its samples of a step."""
        return self.part.order.rows(step, self._first, self._last)

    def look_ahead(self, step: int) -> None:
        """Expect the samples of the steps from ``step`` on.

        The very first are expected one by one, the others by whole windows: so a run that resumes
        has its first batch at once, while the windows are read behind it.
        """
        last = step + self._steps_ahead
        if step != self._next_step:
            self._expected.clear()
            self.reader.expect(self.part.order.epoch(step), self.ids(step))
        for later in range(last if step == self._next_step else step + 1, last + 1):
            for window, samples in self.part.order.ahead(later, self._first, self._last):
                if window not in self._expected:
                    self.reader.expect(window[0], samples)
                self._expected[window] = later
        self._expected = {w: until for w, until in self._expected.items() if until > step}
        self._next_step = step + 1


def _shares(rows: TrainingRows, first: int, last: int, look_ahead: int) -> Iterator[_Share]:
    for part in rows.parts:
        begin = max(first - part.first_row, 0)
        end = min(last - part.first_row, part.order.global_batch_size)
        if begin < end:
            yield _Share(part, begin, end, look_ahead, rows.cache)


@dataclass(frozen=True, eq=False)
class PassRows:
    """Every sample once, cropped in the middle; copies of the last, of weight 0, fill the end.

    A bad sample is an error: a figure over others than it claims would be worse than none.
    """

    index: ShardIndex
    batch_size: int
    transform: Transform
    cache: RangeCache | None = None

    def open(self, first: int, last: int, look_ahead: int = LOOK_AHEAD) -> RowMaker:
        """See ``Rows``."""
        return _PassMaker(self, first, last, look_ahead)


class _PassMaker:
    def __init__(self, rows: PassRows, first: int, last: int, look_ahead: int) -> None:
        self._rows, self._first, self._last = rows, first, last
        self._reader = SampleReader(rows.index, rows.cache)
        self._steps_ahead = -(-look_ahead // (last - first))
        self._expected = 0  # the first step of which nothing is expected yet

    def make(self, step: int) -> Made:
        ahead = step + self._steps_ahead + 1
        for later in range(max(step, self._expected), ahead):
            self._reader.expect(later, self._samples(later))
        self._expected = ahead

        wanted, ids = self._ids(step)
        images = _Images(len(ids))
        samples, counts = np.unique(ids, return_counts=True)
        for sample, count in zip(samples.tolist(), counts.tolist(), strict=True):
            pixels = self._reader.load(step, sample, self._rows.transform, (0.5, 0.5))
            for _ in range(count):
                images.append(pixels)
        arrays: Arrays = {
            "image": images.array,
            "label": self._rows.index.samples["label"][ids].astype(np.int64),
            "index": ids,
            "weight": (wanted < len(self._rows.index)).astype(np.float32),
        }
        return Made(arrays, [])

    def _samples(self, step: int) -> Ids:
        """The samples of a step, each once; none after the end."""
        wanted, ids = self._ids(step)
        return np.unique(ids) if wanted[0] <= ids[0] else ids[:0]

    def _ids(self, step: int) -> tuple[Ids, Ids]:
        """Which samples the rows of a step would be of an endless data set, and which they are."""
        wanted = step * self._rows.batch_size + np.arange(self._first, self._last, dtype=np.int64)
        return wanted, np.minimum(wanted, len(self._rows.index) - 1)

    def close(self) -> None:
        self._reader.close()


class _Images:
    """Pictures (H, W, 3) put into one array (count, 3, H, W), each while it is in the cache."""

    def __init__(self, count: int) -> None:
        self.array = np.empty((count, 3, 0, 0), np.uint8)
        self._next = 0

    def append(self, pixels: Pixels) -> None:
        if self._next == 0:
            self.array = np.empty((len(self.array), 3, *pixels.shape[:2]), np.uint8)
        self.array[self._next] = pixels.transpose(2, 0, 1)
        self._next += 1
