"""What a train step is fed: the stream's batch, its rows, the step and the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rae_xla.data.cache import RangeCache
from rae_xla.data.faults import BadSamples
from rae_xla.data.mixture import Mixture
from rae_xla.data.reader import load_sample
from rae_xla.data.stream import SampleStream
from rae_xla.data.transforms import CenterCrop, make_transform
from rae_xla.runtime import Batch, Runtime

if TYPE_CHECKING:
    from rae_xla.config import RunConfig


def open_stream(
    config: RunConfig,
    runtime: Runtime,
    training_data: Mixture,
    bad_samples: BadSamples,
    *,
    stage: str,
    global_batch: int,
) -> SampleStream:
    """This process's part of the training data, cropped and flipped as the stage has it."""
    data = config.data
    cache = None
    if data.cache_dir is not None:
        cache = RangeCache(data.cache_dir, int(data.cache_gb * 1e9))
        cache.prepare()
    crop = data.crop
    if crop == "auto":
        crop = "random" if stage == "stage1" else "center"
    return SampleStream(
        training_data,
        seed=config.training.global_seed,
        global_batch_size=global_batch,
        transform=make_transform(crop, data.image_size),
        process_index=runtime.process_index,
        process_count=runtime.process_count,
        num_workers=data.num_workers,
        prefetch=data.prefetch,
        flip=stage == "stage2" if data.flip is None else data.flip,
        cache=cache,
        bad_samples=bad_samples,
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


def first_images(data: Mixture, count: int, size: int) -> Tensor:
    """The first ``count`` images of the first source, or all it has, (n, 3, size, size) uint8."""
    index, crop = data.sources[0], CenterCrop(size)
    images = [load_sample(index, i, crop, (0.5, 0.5)) for i in range(min(count, len(index)))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
