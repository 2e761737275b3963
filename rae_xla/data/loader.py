"""Loading batches as tensors: endless and shuffled for training, or every sample once.

The content of a batch depends on its step alone (see ``sampler`` and ``counter_rng``), so a run
resumes by loading its next step, with any number of hosts and worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from rae_xla.data.bad_samples import BadSampleLog
from rae_xla.data.batch_builder import BatchSpec, RowArrays, TrainingBatches
from rae_xla.data.mixture import Mixture
from rae_xla.data.prefetch import build_in_processes, build_in_thread
from rae_xla.data.shards.index import ShardIndex
from rae_xla.data.single_pass import SinglePassBatches
from rae_xla.data.transforms import Transform
from rae_xla.errors import UserError
from rae_xla.storage.cache import RangeCache

Batch = dict[str, Tensor]
"""``image`` uint8 (b, 3, H, W), ``label`` int64 (b,), and ``index`` int64 (b,): the sample ids.
``one_pass`` adds ``weight`` float32 (b,): 1, or 0 for a row that only fills the last batch."""


class TrainingLoader:
    """Loads the training batches of one process, step by step and without end.

    Step k is the same global batch on every topology: process p of P gets rows ``p*b`` to
    ``(p+1)*b`` of it, with b = ``global_batch_size / P``.

    Attributes:
        first: first row of this process in the global batch.
        last: row after the last.

    Args:
        data: from ``open_index``, or from ``open_training_data``, which can mix several sources.
        seed: of the order, the crops and the flips.
        global_batch_size: rows of a step over all processes.
        transform: from a decoded image to uint8 (H, W, 3), see ``transforms``; must pickle if there
            are workers.
        process_index: of this process, from 0.
        process_count: number of processes that share the global batch.
        num_workers: processes that decode; with 0, a thread decodes while the caller computes.
        shuffle: use a new order in every epoch rather than the order of the index.
        flip: flip half of the images horizontally, at random.
        prefetch: batches built ahead of the one in use.
        cache: disk cache of this host, if any.
        bad_samples: counts bad samples, which are replaced, and ends the run if there are too many.
        row_arrays: makes further arrays of every row, such as the tokens of its caption.

    Raises:
        UserError: the batch cannot be divided, or the data set is smaller than one batch; from
            ``batches``, if there are too many bad samples or nothing can be read.
    """

    def __init__(
        self,
        data: ShardIndex | Mixture,
        *,
        seed: int,
        global_batch_size: int,
        transform: Transform,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 0,
        shuffle: bool = True,
        flip: bool = False,
        prefetch: int = 2,
        cache: RangeCache | None = None,
        bad_samples: BadSampleLog | None = None,
        row_arrays: RowArrays | None = None,
    ) -> None:
        self.first, self.last = _local_rows(global_batch_size, process_index, process_count)
        mixture = data if isinstance(data, Mixture) else Mixture((data,), (1.0,))
        self._num_samples, self._global_batch_size = len(mixture), global_batch_size
        arrange = None if row_arrays is None else row_arrays.arrange
        sources = mixture.source_rows(global_batch_size, seed, shuffle, arrange)
        self._spec = TrainingBatches(sources, transform, flip, cache, row_arrays)
        self._workers = _Workers(num_workers, prefetch)
        self._bad = bad_samples or BadSampleLog(per_epoch=len(mixture) // process_count)

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in an epoch.

        With several sources: the steps that take as many samples as all of them have.
        """
        return self._num_samples // self._global_batch_size

    def global_ids(self, step: int) -> list[int]:
        """Return the sample id of every row of the global batch of a step."""
        ids = np.empty(self._global_batch_size, np.int64)
        for source in self._spec.sources:
            count = source.sampler.global_batch_size
            ids[source.positions] = source.sampler.sample_ids(step, 0, count) + source.first_id
        return ids.tolist()

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Return the batches from ``start_step`` on; the cost is the same for every step."""
        return _load(self._spec, count(start_step), self.first, self.last, self._workers, self._bad)


def one_pass(
    index: ShardIndex,
    *,
    batch_size: int,
    transform: Transform,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
    cache: RangeCache | None = None,
) -> Iterator[Batch]:
    """Load every sample exactly once, in the order of the index, in batches of one shape.

    Every process gets the same number of batches. Copies of the last sample, with ``weight`` 0,
    fill the last batch. Crops are centred.

    Args:
        index: from ``open_index``.
        batch_size: rows over all processes; process p of P gets rows ``p*b`` to ``(p+1)*b``.
        transform: as for ``TrainingLoader``.
        process_index: of this process, from 0.
        process_count: number of processes that share the pass.
        num_workers: as for ``TrainingLoader``.
        prefetch: as for ``TrainingLoader``.
        cache: as for ``TrainingLoader``.

    Raises:
        UserError: ``batch_size`` cannot be divided, or a sample cannot be used.
    """
    first, last = _local_rows(batch_size, process_index, process_count)
    steps = iter(range(-(-len(index) // batch_size)))
    spec = SinglePassBatches(index, batch_size, transform, cache)
    return _load(spec, steps, first, last, _Workers(num_workers, prefetch), BadSampleLog())


@dataclass(frozen=True)
class _Workers:
    """How batches are built: by ``processes`` (0: a thread), ``prefetch`` of them ahead."""

    processes: int
    prefetch: int


def _local_rows(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    """Return the first row of a process in the global batch, and the row after its last."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a global batch of {batch_size} cannot be divided among {process_count} processes: "
            "choose a multiple"
        )
    rows = batch_size // process_count
    return process_index * rows, (process_index + 1) * rows


def _load(
    spec: BatchSpec,
    steps: Iterator[int],
    first: int,
    last: int,
    workers: _Workers,
    bad_samples: BadSampleLog,
) -> Iterator[Batch]:
    """Yield rows ``first:last`` of every step as tensors, and record the bad samples."""
    processes, prefetch = workers.processes, workers.prefetch
    if processes < 0:
        raise UserError(f"data.num_workers is {processes}; it must be at least 0")
    if processes == 0:
        built = build_in_thread(spec, steps, first, last, prefetch)
    else:
        built = build_in_processes(spec, steps, first, last, prefetch, processes)
    with closing(built):
        for arrays, bad in built:
            bad_samples.record(last - first, bad)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            # Copied, because the workers are about to write to this shared memory again.
            yield {k: v.clone() for k, v in batch.items()} if processes else batch
