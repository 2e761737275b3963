"""The rows that a data source contributes to every batch, and reading their samples ahead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rae_xla.data.reader import SampleReader
from rae_xla.data.sampler import BatchSampler, SampleIds, WindowKey
from rae_xla.data.shards.index import ShardIndex
from rae_xla.storage.cache import RangeCache


@dataclass(frozen=True, eq=False)
class SourceRows:
    """The rows that one source contributes to every step.

    Attributes:
        index: of its shards.
        sampler: order of its samples; its ``global_batch_size`` is the number of these rows.
        positions: of the rows in the global batch, ascending.
        first_id: added to its sample numbers, so that the ids of all sources differ.
        first_image: of each sample, one more than there are samples, where samples have no image
            or several; None: sample i has image i.
    """

    index: ShardIndex
    sampler: BatchSampler
    positions: NDArray[np.int64]
    first_id: int = 0
    first_image: NDArray[np.int64] | None = None

    def images_of(self, samples: SampleIds) -> SampleIds:
        """Return the numbers of the images of samples, in order."""
        if self.first_image is None:
            return samples
        ranges = [
            np.arange(self.first_image[sample], self.first_image[sample + 1]) for sample in samples
        ]
        return np.concatenate([np.zeros(0, np.int64), *ranges])

    def describe_place(self, sample: int) -> tuple[str, int]:
        """Return the shard of a sample and the offset of its first image, for a report."""
        images = self.images_of(np.array([sample]))
        if not len(images):
            return self.index.folder, 0
        first = int(images[0])
        path = self.index.path_of(self.index.shard_of(first))
        return path, int(self.index.samples["offset"][first])


class SourceReader:
    """Reads what one worker needs of a source: rows ``first:last`` of those it contributes.

    Attributes:
        number: of the source.
        positions: of these rows in the global batch.
    """

    def __init__(
        self,
        rows: SourceRows,
        number: int,
        first: int,
        last: int,
        look_ahead: int,
        cache: RangeCache | None,
    ) -> None:
        self.rows, self.number, self._first, self._last = rows, number, first, last
        self.reader = SampleReader(rows.index, cache)
        self.positions = rows.positions[first:last]
        self._steps_ahead = -(-look_ahead // (last - first))
        self._next_step = -1
        # Windows that are being read, and the last step known to use each.
        self._windows: dict[WindowKey, int] = {}

    def labels(self, samples: SampleIds) -> NDArray[np.int64]:
        """Return the labels of samples."""
        if self.rows.first_image is not None:
            return np.zeros(len(samples), np.int64)
        return self.rows.index.samples["label"][samples].astype(np.int64)

    def sample_ids(self, step: int) -> SampleIds:
        """Return the samples of a step."""
        return self.rows.sampler.sample_ids(step, self._first, self._last)

    def read_ahead(self, step: int) -> None:
        """Start to read the samples of the steps from ``step`` on.

        The samples of the first step are read singly, all others by windows: so a run that resumes
        gets its first batch at once, while the windows are read in the background.
        """
        sampler = self.rows.sampler
        last = step + self._steps_ahead
        if step != self._next_step:
            self._windows.clear()
            self._start(sampler.epoch(step), self.sample_ids(step))
        for later in range(last if step == self._next_step else step + 1, last + 1):
            for window, samples in sampler.upcoming(later, self._first, self._last):
                if window not in self._windows:
                    self._start(window[0], samples)
                self._windows[window] = later
        self._windows = {w: until for w, until in self._windows.items() if until > step}
        self._next_step = step + 1

    def _start(self, epoch: int, samples: SampleIds) -> None:
        self.reader.read_ahead(epoch, self.rows.images_of(samples))


def source_readers(
    sources: Sequence[SourceRows],
    first: int,
    last: int,
    look_ahead: int,
    cache: RangeCache | None,
) -> Iterator[SourceReader]:
    """Yield a reader for every source that contributes to rows ``first:last``."""
    for number, rows in enumerate(sources):
        begin, end = np.searchsorted(rows.positions, (first, last)).tolist()
        if begin < end:
            yield SourceReader(rows, number, begin, end, look_ahead, cache)
