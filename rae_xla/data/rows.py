"""The rows of a step: a pure function of the step, with NumPy and Pillow alone.

Torch is left out on purpose: worker processes import this module, and without torch they start in
a fraction of a second and weigh a tenth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rae_xla.data.counter import Purpose, uniform
from rae_xla.data.index import ShardIndex
from rae_xla.data.order import Ids, SampleOrder
from rae_xla.data.reader import load_sample
from rae_xla.data.transforms import Transform, flip

Arrays = dict[str, NDArray[Any]]
"""``image`` uint8 (b, 3, H, W), ``label`` and ``index`` int64 (b,), perhaps ``weight``."""

Rows = Callable[[int, int, int], Arrays]
"""(step, first, last) -> rows ``first:last`` of the global batch of that step."""


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Shuffled, cropped and flipped."""

    index: ShardIndex
    order: SampleOrder
    transform: Transform
    flip: bool

    def __call__(self, step: int, first: int, last: int) -> Arrays:
        """Rows ``first:last`` of training step ``step``."""
        ids = self.order.rows(step, first, last)
        seed, epoch = self.order.seed, self.order.epoch(step)
        crops = np.stack(
            [uniform(seed, purpose, epoch, ids) for purpose in (Purpose.CROP_X, Purpose.CROP_Y)], 1
        )
        flips = uniform(seed, Purpose.FLIP, epoch, ids) < 0.5
        return _load(self.index, ids, self.transform, crops, flips & self.flip)


@dataclass(frozen=True, eq=False)
class PassRows:
    """Every sample once, cropped in the middle; copies of the last, of weight 0, fill the end."""

    index: ShardIndex
    batch_size: int
    transform: Transform

    def __call__(self, step: int, first: int, last: int) -> Arrays:
        """Rows ``first:last`` of batch ``step`` of the pass."""
        wanted = step * self.batch_size + np.arange(first, last, dtype=np.int64)
        ids = np.minimum(wanted, len(self.index) - 1)
        middle = np.full((len(ids), 2), 0.5)
        rows = _load(self.index, ids, self.transform, middle, np.zeros(len(ids), np.bool_))
        rows["weight"] = (wanted < len(self.index)).astype(np.float32)
        return rows


def _load(
    index: ShardIndex,
    ids: Ids,
    transform: Transform,
    crops: NDArray[np.float64],
    flips: NDArray[np.bool_],
) -> Arrays:
    images = np.empty((0, 3, 0, 0), np.uint8)
    for row, (sample, u) in enumerate(zip(ids.tolist(), crops.tolist(), strict=True)):
        pixels = load_sample(index, sample, transform, u)
        if row == 0:
            images = np.empty((len(ids), 3, *pixels.shape[:2]), np.uint8)
        # At once, while the pixels are still in the cache.
        images[row] = (flip(pixels) if flips[row] else pixels).transpose(2, 0, 1)
    return {
        "image": images,
        "label": index.samples["label"][ids].astype(np.int64),
        "index": ids,
    }
