"""Batches from shards: endless and shuffled for training, or every sample once.

What a batch holds depends on its step alone (see ``order`` and ``counter``), so a run resumes by
asking for its next step, on any number of hosts and worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from rae_xla.data.index import ShardIndex
from rae_xla.data.order import SampleOrder, block_size
from rae_xla.data.prefetch import in_processes, in_thread
from rae_xla.data.rows import PassRows, Rows, TrainingRows
from rae_xla.data.transforms import Transform
from rae_xla.errors import UserError

Batch = dict[str, Tensor]
"""``image`` uint8 (b, 3, H, W), ``label`` int64 (b,), ``index`` int64 (b,): the sample ids; from
``one_pass`` also ``weight`` float32 (b,): 1, or 0 for a row that only fills up the last batch."""


class SampleStream:
    """The training batches of one process, step by step and without end.

    Step k is the same global batch on every topology: process p of P gets rows ``p*b`` to
    ``(p+1)*b`` of it, b being ``global_batch_size / P``.

    Args:
        index: from ``open_index``.
        seed: of the order, the crops and the flips.
        global_batch_size: rows of a step over all processes.
        transform: from a decoded picture to bytes (H, W, 3), see ``transforms``; it must pickle
            if there are workers.
        process_index: this process, from 0.
        process_count: how many processes share the global batch.
        num_workers: processes that decode; with 0 a thread does, while the caller computes.
        shuffle: a new order every epoch; else the order of the index.
        flip: exchange left and right of every other image, by chance.
        prefetch: batches made ahead of the one in use.

    Raises:
        UserError: if the batch cannot be divided, or the data set is smaller than one batch; from
            ``batches``, if a sample cannot be read.
    """

    def __init__(
        self,
        index: ShardIndex,
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
    ) -> None:
        self.first, self.last = _rows_of(global_batch_size, process_index, process_count)
        block = block_size(len(index), index.num_bytes)
        self.order = SampleOrder(len(index), global_batch_size, seed, block, shuffle)
        self._rows = TrainingRows(index, self.order, transform, flip)
        self._num_workers, self._prefetch = num_workers, prefetch

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; what is left over waits for another epoch."""
        return self.order.steps_per_epoch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from ``start_step`` on; where it is makes no difference to the cost."""
        return _run(
            self._rows, count(start_step), self.first, self.last, self._num_workers, self._prefetch
        )


def one_pass(
    index: ShardIndex,
    *,
    batch_size: int,
    transform: Transform,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Every sample exactly once, in the order of the index, in batches of one shape.

    Every process gets equally many batches. The last is filled up with copies of the last sample,
    of ``weight`` 0. Crops are cut in the middle.

    Args:
        index: from ``open_index``.
        batch_size: rows over all processes; process p of P gets rows ``p*b`` to ``(p+1)*b``.
        transform: as for ``SampleStream``.
        process_index: this process, from 0.
        process_count: how many processes share the pass.
        num_workers: as for ``SampleStream``.
        prefetch: as for ``SampleStream``.

    Raises:
        UserError: if ``batch_size`` cannot be divided, or a sample cannot be read.
    """
    first, last = _rows_of(batch_size, process_index, process_count)
    steps = iter(range(-(-len(index) // batch_size)))
    rows = PassRows(index, batch_size, transform)
    return _run(rows, steps, first, last, num_workers, prefetch)


def _rows_of(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a global batch of {batch_size} cannot be divided among {process_count} processes: "
            "choose a multiple"
        )
    rows = batch_size // process_count
    return process_index * rows, (process_index + 1) * rows


def _run(
    rows: Rows, steps: Iterator[int], first: int, last: int, num_workers: int, prefetch: int
) -> Iterator[Batch]:
    if num_workers == 0:
        for arrays in in_thread(rows, steps, first, last, prefetch):
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}
        return
    for arrays in in_processes(rows, steps, first, last, prefetch, num_workers):
        # A copy: the shared memory is about to be written again.
        yield {name: torch.from_numpy(array).clone() for name, array in arrays.items()}
