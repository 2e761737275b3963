"""What a train step is fed: the stream's batch, its rows, the step and the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rae_xla.data.shards import ShardIndex
from rae_xla.data.stream import SampleStream, one_pass
from rae_xla.data.transforms import CenterCrop, make_transform
from rae_xla.runtime import Batch, Runtime

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def open_stream(
    config: RunConfig, runtime: Runtime, index: ShardIndex, *, stage: str, global_batch: int
) -> SampleStream:
    """This process's part of the training data, cropped and flipped as the stage has it."""
    data = config.data
    crop = data.crop
    if crop == "auto":
        crop = "random" if stage == "stage1" else "center"
    return SampleStream(
        index,
        seed=config.training.global_seed,
        global_batch_size=global_batch,
        transform=make_transform(crop, data.image_size),
        process_index=runtime.process_index,
        process_count=runtime.process_count,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        flip=stage == "stage2" if data.flip is None else data.flip,
    )


def step_batches(
    stream: SampleStream, inputs: Callable[[int], dict[str, Tensor]], start: int, stop: int
) -> Iterator[Batch]:
    """Host batches of the steps from ``start`` to ``stop``, see ``Step``; ``inputs`` gives what a
    step is told besides.
    """
    rows = torch.arange(stream.first, stream.last, dtype=torch.int32)
    for step, batch in zip(range(start, stop), stream.batches(start), strict=False):
        yield {
            "image": batch["image"],
            "label": batch["label"],
            "row": rows,
            "step": torch.tensor(step, dtype=torch.int32),
        } | inputs(step)


def first_images(index: ShardIndex, count: int, size: int) -> Tensor:
    """The first ``count`` images of a data set, (count, 3, size, size) uint8."""
    passes = one_pass(index, batch_size=count, transform=CenterCrop(size))
    return next(islice(passes, 1))["image"]
