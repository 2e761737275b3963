"""Batches that hold every sample once, for evaluation and statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rae_xla.data.batch_builder import LOOK_AHEAD, Arrays, BatchBuilder, BuiltRows
from rae_xla.data.image_stack import ImageStack
from rae_xla.data.reader import SampleReader
from rae_xla.data.sampler import SampleIds
from rae_xla.data.shards.index import ShardIndex
from rae_xla.data.transforms import Transform
from rae_xla.storage.cache import RangeCache


@dataclass(frozen=True, eq=False)
class SinglePassBatches:
    """Every sample once, centre-cropped; copies of the last, with weight 0, fill the last batch.

    A bad sample is an error: a metric over other samples than it claims would be misleading.
    """

    index: ShardIndex
    batch_size: int
    transform: Transform
    cache: RangeCache | None = None

    def open(self, first: int, last: int, look_ahead: int = LOOK_AHEAD) -> BatchBuilder:
        """See ``BatchSpec``."""
        return _SinglePassBuilder(self, first, last, look_ahead)


class _SinglePassBuilder:
    def __init__(self, spec: SinglePassBatches, first: int, last: int, look_ahead: int) -> None:
        self._spec, self._first, self._last = spec, first, last
        self._reader = SampleReader(spec.index, spec.cache)
        self._steps_ahead = -(-look_ahead // (last - first))
        self._next_ahead = 0  # the first step whose read-ahead has not started

    def build(self, step: int) -> BuiltRows:
        end = step + self._steps_ahead + 1
        for later in range(max(step, self._next_ahead), end):
            self._reader.read_ahead(later, self._samples(later))
        self._next_ahead = end

        wanted, ids = self._ids(step)
        images, row = ImageStack(len(ids)), 0
        samples, counts = np.unique(ids, return_counts=True)
        for sample, count in zip(samples.tolist(), counts.tolist(), strict=True):
            pixels = self._reader.load(step, sample, self._spec.transform, (0.5, 0.5))
            for _ in range(count):
                images.put(row, 0, pixels)
                row += 1
        arrays: Arrays = {
            "image": images.complete(self._spec.transform),
            "label": self._spec.index.samples["label"][ids].astype(np.int64),
            "index": ids,
            "weight": (wanted < len(self._spec.index)).astype(np.float32),
        }
        return BuiltRows(arrays, [])

    def _samples(self, step: int) -> SampleIds:
        """Return the samples of a step, each once; none after the end of the data set."""
        wanted, ids = self._ids(step)
        return np.unique(ids) if wanted[0] <= ids[0] else ids[:0]

    def _ids(self, step: int) -> tuple[SampleIds, SampleIds]:
        """Return the row numbers of a step in the complete pass, and the sample of each row."""
        wanted = step * self._spec.batch_size + np.arange(self._first, self._last, dtype=np.int64)
        return wanted, np.minimum(wanted, len(self._spec.index) - 1)

    def close(self) -> None:
        self._reader.close()
