"""Pictures that are drawn as they are measured, and kept nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from rae_xla.sample.generate import ImageSampler
from rae_xla.sample.pictures import Pixels


class DrawnPictures:
    """The first ``count`` pictures of a seed, equally over the classes; see ``PictureSet``.

    They are those that ``rae-xla sample --labels equal`` draws, where the classes divide the count;
    otherwise some classes have one more than others.

    Args:
        sampler: draws them; all processes of a run together.
        count: how many.
        side: of a picture, in pixels.
        num_classes: that the model knows.
        seed: of the set.
        batch_size: drawn at a time, rounded up to whole chunks.
        moved: called at every step of the sampler.
    """

    name = "the samples drawn"

    def __init__(
        self,
        sampler: ImageSampler,
        count: int,
        side: int,
        *,
        num_classes: int,
        seed: int,
        batch_size: int,
        moved: Callable[[], None],
    ) -> None:
        self.count, self.side = count, side
        self._sampler, self._seed, self._batch_size = sampler, seed, batch_size
        self._labels = torch.arange(count) * num_classes // count
        self._moved = moved

    def chunks(self, rows: int, own: slice) -> Iterator[Pixels]:
        """See ``PictureSet``. Every batch has the same shape, so that nothing is compiled twice."""
        batch = -(-self._batch_size // rows) * rows
        for start in range(0, self.count, batch):
            numbers = torch.arange(start, start + batch)
            labels = self._labels[numbers.clamp_max(self.count - 1)]
            pictures = self._sampler(
                self._seed, numbers.int(), labels, progress=lambda *_: self._moved()
            )
            real = pictures[: self.count - start].transpose(0, 3, 1, 2)
            for first in range(0, len(real), rows):
                yield np.ascontiguousarray(real[first : first + rows][own])
