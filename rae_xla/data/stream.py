"""Batches from shards: endless and shuffled for training, or every sample once.

What a batch holds depends on its step alone (see ``order`` and ``counter``), so a run resumes by
asking for its next step, on any number of hosts and worker processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import count

import torch
from torch import Tensor

from rae_xla.data.cache import RangeCache
from rae_xla.data.faults import BadSamples
from rae_xla.data.index import ShardIndex
from rae_xla.data.mixture import Mixture
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
        data: from ``open_index``, or from ``open_training_data``, which may mix several sources.
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
        cache: where what is read is kept on this host, if anywhere.
        bad_samples: what becomes of samples that cannot be used: others stand in for them, until
            there are too many. By default they are told on stderr.

    Raises:
        UserError: if the batch cannot be divided, or the data set is smaller than one batch; from
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
        bad_samples: BadSamples | None = None,
    ) -> None:
        self.first, self.last = _rows_of(global_batch_size, process_index, process_count)
        mixture = data if isinstance(data, Mixture) else Mixture((data,), (1.0,))
        self._num_samples, self._global_batch_size = len(mixture), global_batch_size
        parts = mixture.parts(global_batch_size, seed, shuffle)
        self._rows = TrainingRows(parts, transform, flip, cache)
        self._num_workers, self._prefetch = num_workers, prefetch
        self._bad = bad_samples or BadSamples(per_epoch=len(mixture) // process_count)

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; what is left over waits for another epoch.

        Of several sources: the steps that take as many samples as there are in all of them.
        """
        return self._num_samples // self._global_batch_size

    def global_ids(self, step: int) -> list[int]:
        """The sample of every row of the global batch of a step."""
        return [
            int(sample) + part.first_id
            for part in self._rows.parts
            for sample in part.order.rows(step, 0, part.order.global_batch_size)
        ]

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from ``start_step`` on; where it is makes no difference to the cost."""
        return _run(
            self._rows,
            count(start_step),
            self.first,
            self.last,
            self._num_workers,
            self._prefetch,
            self._bad,
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
    cache: RangeCache | None = None,
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
        cache: as for ``SampleStream``.

    Raises:
        UserError: if ``batch_size`` cannot be divided, or a sample cannot be used.
    """
    first, last = _rows_of(batch_size, process_index, process_count)
    steps = iter(range(-(-len(index) // batch_size)))
    rows = PassRows(index, batch_size, transform, cache)
    return _run(rows, steps, first, last, num_workers, prefetch, BadSamples())


def _rows_of(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a global batch of {batch_size} cannot be divided among {process_count} processes: "
            "choose a multiple"
        )
    rows = batch_size // process_count
    return process_index * rows, (process_index + 1) * rows


def _run(
    rows: Rows,
    steps: Iterator[int],
    first: int,
    last: int,
    num_workers: int,
    prefetch: int,
    bad_samples: BadSamples,
) -> Iterator[Batch]:
    if num_workers < 0:
        raise UserError(f"data.num_workers is {num_workers}; it must be at least 0")
    if num_workers == 0:
        made = in_thread(rows, steps, first, last, prefetch)
    else:
        made = in_processes(rows, steps, first, last, prefetch, num_workers)
    with closing(made):
        for arrays, bad in made:
            bad_samples.take(last - first, bad)
            batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
            # A copy of shared memory, which is about to be written again.
            yield {k: v.clone() for k, v in batch.items()} if num_workers else batch
