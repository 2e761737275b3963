"""Validation losses of a text-to-image model: the same captions, noise and times at every call.

The flow-matching loss is measured at eight fixed times, because its value depends on the time far
more than on the quality of the model: runs and checkpoints are comparable at each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from rae_xla.data.mixture import CaptionedMixture, open_training_data
from rae_xla.data.reader import load_sample
from rae_xla.data.transforms import Transform, make_transform
from rae_xla.errors import UserError
from rae_xla.runtime import Backend, Batch
from rae_xla.sample.rows import share_rows

if TYPE_CHECKING:
    from rae_xla.config import RunConfig
    from rae_xla.data.captions import CaptionRows

TIMES = tuple((i + 1) / 9 for i in range(8))
"""Unshifted times of the measured losses."""

DEFAULT_IMAGES = 256
"""Images of a validation without ``eval.num_images``."""

Sums = Callable[[nn.Module, Batch], Tensor]
"""Sums over the rows of a batch: the image losses at ``TIMES``, the number of images, the text
loss, the tokens predicted, and the supervised tokens. (12,), of a row with ``weight`` 0 nothing."""


class ValidationLoss:
    """Measures the losses of a model on held-back captions.

    Args:
        config: with an ``eval`` section.
        backend: of the run.
        rows_of: makes token rows of the captions of a data set.
        sums: of a batch, see ``Sums``.

    Attributes:
        path: of the captions.
        count: number of samples.

    Raises:
        UserError: there are no validation captions.
    """

    def __init__(
        self,
        config: RunConfig,
        backend: Backend,
        rows_of: Callable[[CaptionedMixture], CaptionRows],
        sums: Sums,
    ) -> None:
        assert config.eval is not None
        path = config.eval.data_path or config.data.val
        if path is None:
            raise UserError(
                "eval needs captioned images: set eval.data_path=SHARDS or data.val=SHARDS, or "
                "train without evaluation: eval=null"
            )
        data = open_training_data(path)
        if not isinstance(data, CaptionedMixture):
            raise UserError(f"{path} has no captions: index it with `rae-xla shards index`")
        self._backend, self._sums = backend, sums
        self._compiled: dict[int, Callable[[Batch], Tensor]] = {}
        self.path = path
        count = self.count = min(config.eval.num_images or DEFAULT_IMAGES, len(data))
        size = -(-min(config.eval.batch_size, count) // backend.mesh.batch_shards)
        rows = size * backend.mesh.batch_shards
        tokens, crop = rows_of(data), make_transform("center", config.data.image_size)
        self._batches = [
            _load(data, tokens, crop, range(first, min(first + rows, count)), rows)
            for first in range(0, count, rows)
        ]

    @property
    def batches(self) -> int:
        """Number of batches, after each of which ``on_progress`` is called."""
        return len(self._batches)

    def __call__(self, model: nn.Module, on_progress: Callable[[], None]) -> dict[str, float]:
        """Return the losses of a model on the devices; all processes call this together."""
        if id(model) not in self._compiled:
            self._compiled[id(model)] = self._backend.compile(lambda batch: self._run(model, batch))
        total = torch.zeros(len(TIMES) + 4, dtype=torch.float64)
        for rows in self._batches:
            [sums] = self._backend.fetch(
                [self._compiled[id(model)](share_rows(self._backend, rows))]
            )
            total += sums.double()
            on_progress()
        images, text, matches, tokens = total[len(TIMES) :].tolist()
        losses = (total[: len(TIMES)] / max(images, 1)).tolist()
        return {
            "image_loss": sum(losses) / len(losses),
            **{f"image_loss_at_{t:.2f}": x for t, x in zip(TIMES, losses, strict=True)},
            "text_loss": text / max(tokens, 1),
            "token_accuracy": matches / max(tokens, 1),
        }

    @torch.no_grad()
    def _run(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._backend.autocast():
            sums = self._sums(model, batch)
        # The sum over all processes is their mean times their number.
        [mean] = self._backend.global_mean([sums.float()])
        return mean * self._backend.process_count


def _load(
    data: CaptionedMixture, tokens: CaptionRows, crop: Transform, samples: range, rows: int
) -> dict[str, Tensor]:
    """Return the rows of some samples of the first source; further rows have weight 0."""
    arrays = [tokens.arrays(0, sample, 0, 0) for sample in samples]
    images = [_images(data, sample, crop, tokens.images_per_row) for sample in samples]
    missing = rows - len(samples)
    arrays += [arrays[-1]] * missing
    images += [images[-1]] * missing
    stacked = torch.from_numpy(np.stack(images))
    return {
        "image": stacked[:, 0] if tokens.images_per_row == 1 else stacked,
        "ids": torch.from_numpy(np.stack([row["ids"] for row in arrays])),
        "labels": torch.from_numpy(np.stack([row["labels"] for row in arrays])),
        "row": torch.arange(samples.start, samples.start + rows, dtype=torch.int32),
        "weight": torch.cat([torch.ones(len(samples)), torch.zeros(missing)]),
    }


def _images(data: CaptionedMixture, sample: int, crop: Transform, slots: int) -> NDArray[np.uint8]:
    """Return the images of a sample of the first source, (slots, 3, H, W)."""
    index, first = data.sources[0], data.first_image(0)
    numbers = range(sample, sample + 1)
    if first is not None:
        numbers = range(int(first[sample]), int(first[sample + 1]))
    images = [load_sample(index, number, crop, (0.5, 0.5)) for number in numbers]
    empty = np.asarray(crop(Image.new("RGB", (8, 8)), (0.5, 0.5))) * 0
    images += [empty] * (slots - len(images))
    return np.stack(images).transpose(0, 3, 1, 2)
