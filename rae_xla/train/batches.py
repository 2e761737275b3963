"""Batches of a train step: the samples, their row numbers and the scalars of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rae_xla.config import RunConfig
from rae_xla.data.bad_samples import BadSampleLog
from rae_xla.data.batch_builder import RowArrays
from rae_xla.data.loader import TrainingLoader
from rae_xla.data.mixture import Mixture
from rae_xla.data.reader import load_sample
from rae_xla.data.transforms import CenterCrop, make_transform
from rae_xla.runtime import Backend, Batch
from rae_xla.runtime.data_workers import worker_count
from rae_xla.storage.cache import RangeCache


def open_loader(
    config: RunConfig,
    backend: Backend,
    training_data: Mixture,
    bad_samples: BadSampleLog,
    *,
    crop: Literal["center", "random"],
    flip: bool,
    global_batch: int,
    row_arrays: RowArrays | None = None,
) -> TrainingLoader:
    """Open this process's share of the training data.

    Args:
        config: of the run; ``data.crop`` and ``data.flip`` override the next two.
        backend: whose processes share the data.
        training_data: the shards.
        bad_samples: counts and lists the samples that had to be replaced.
        crop: the task's crop, ``center`` or ``random``.
        flip: whether the task mirrors half of the images.
        global_batch: images of a step, over all processes.
        row_arrays: ``Task.row_arrays``.
    """
    data = config.data
    cache = None
    if data.cache_dir is not None:
        cache = RangeCache(data.cache_dir, int(data.cache_gb * 1e9))
        cache.prepare()
    return TrainingLoader(
        training_data,
        seed=config.training.global_seed,
        global_batch_size=global_batch,
        transform=make_transform(crop if data.crop == "auto" else data.crop, data.image_size),
        process_index=backend.process_index,
        process_count=backend.process_count,
        num_workers=worker_count(backend, data.num_workers),
        prefetch=data.prefetch,
        flip=flip if data.flip is None else data.flip,
        cache=cache,
        bad_samples=bad_samples,
        row_arrays=row_arrays,
    )


def host_batches(
    loader: TrainingLoader, inputs: Callable[[int], dict[str, Tensor]], start: int, stop: int
) -> Iterator[Batch]:
    """Yield this process's batches of the steps from ``start`` to ``stop``, on the CPU.

    Args:
        loader: yields ``image`` and ``label``.
        inputs: ``Task.inputs``, the scalars of a step.
        start: first step.
        stop: last step plus one.
    """
    rows = torch.arange(loader.first, loader.last, dtype=torch.int32)
    for step, batch in zip(range(start, stop), loader.batches(start), strict=False):
        yield {**batch, "row": rows, "step": torch.tensor(step, dtype=torch.int32), **inputs(step)}


def first_images(data: Mixture, count: int, size: int) -> Tensor:
    """Return the first ``count`` images of the first source (fewer if it has fewer), cropped.

    Returns:
        (n, 3, size, size) uint8.
    """
    index, crop = data.sources[0], CenterCrop(size)
    images = [load_sample(index, i, crop, (0.5, 0.5)) for i in range(min(count, len(index)))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
