"""Batches from shards: endless and shuffled for training, or every sample once.

What a batch holds depends on its step alone (see ``order`` and ``counter``), so a run resumes by
asking for its next step, on any number of hosts and worker processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rae_xla.data.counter import Purpose, uniform
from rae_xla.data.index import ShardIndex
from rae_xla.data.order import Ids, SampleOrder, block_size
from rae_xla.data.reader import load_sample
from rae_xla.data.transforms import Transform, flip
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
        self._rows = _TrainingRows(index, self.order, transform, flip)
        self._num_workers, self._prefetch = num_workers, prefetch

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; what is left over waits for another epoch."""
        return self.order.steps_per_epoch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from ``start_step`` on; where it is makes no difference to the cost."""
        loader = _Loader(self._rows, self.first, self.last, self._num_workers, self._prefetch)
        return loader.run(count(start_step))


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
    rows = _PassRows(index, batch_size, transform)
    loader = _Loader(rows, first, last, num_workers, prefetch)
    return loader.run(range(-(-len(index) // batch_size)))


def _rows_of(batch_size: int, process_index: int, process_count: int) -> tuple[int, int]:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a global batch of {batch_size} cannot be divided among {process_count} processes: "
            "choose a multiple"
        )
    rows = batch_size // process_count
    return process_index * rows, (process_index + 1) * rows


@dataclass(frozen=True, eq=False)
class _TrainingRows:
    """Rows ``first:last`` of a training step."""

    index: ShardIndex
    order: SampleOrder
    transform: Transform
    flip: bool

    def __call__(self, step: int, first: int, last: int) -> Batch:
        ids = self.order.rows(step, first, last)
        seed, epoch = self.order.seed, self.order.epoch(step)
        crops = np.stack(
            [uniform(seed, purpose, epoch, ids) for purpose in (Purpose.CROP_X, Purpose.CROP_Y)], 1
        )
        flips = uniform(seed, Purpose.FLIP, epoch, ids) < 0.5
        return _load(self.index, ids, self.transform, crops, flips & self.flip)


@dataclass(frozen=True, eq=False)
class _PassRows:
    """Rows ``first:last`` of a batch of a pass over everything."""

    index: ShardIndex
    batch_size: int
    transform: Transform

    def __call__(self, step: int, first: int, last: int) -> Batch:
        wanted = step * self.batch_size + np.arange(first, last, dtype=np.int64)
        ids = np.minimum(wanted, len(self.index) - 1)
        middle = np.full((len(ids), 2), 0.5)
        batch = _load(self.index, ids, self.transform, middle, np.zeros(len(ids), bool))
        batch["weight"] = torch.from_numpy((wanted < len(self.index)).astype(np.float32))
        return batch


Rows = Callable[[int, int, int], Batch]


def _load(
    index: ShardIndex,
    ids: Ids,
    transform: Transform,
    crops: np.ndarray[Any, np.dtype[np.float64]],
    flips: np.ndarray[Any, np.dtype[np.bool_]],
) -> Batch:
    images: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    for row, sample in enumerate(ids.tolist()):
        pixels = load_sample(index, sample, transform, crops[row])
        if images is None:
            images = np.empty((len(ids), 3, *pixels.shape[:2]), np.uint8)
        images[row] = (flip(pixels) if flips[row] else pixels).transpose(2, 0, 1)
    return {
        "image": torch.from_numpy(images),
        "label": torch.from_numpy(index.samples["label"][ids].astype(np.int64)),
        "index": torch.from_numpy(ids),
    }


@dataclass(frozen=True)
class _Loader:
    """Makes the rows of one step after another ahead of use, in a thread or in processes."""

    rows: Rows
    first: int
    last: int
    num_workers: int
    prefetch: int

    def run(self, steps: Iterable[int]) -> Iterator[Batch]:
        """A batch for every step, in order."""
        if self.num_workers == 0:
            return self._in_thread(iter(steps))
        return self._in_processes(steps)

    def _in_thread(self, steps: Iterator[int]) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, "rae-xla-data") as thread:

            def submit(step: int) -> Future[Batch]:
                return thread.submit(self.rows, step, self.first, self.last)

            ahead = deque(submit(step) for step in islice(steps, max(1, self.prefetch)))
            try:
                while ahead:
                    batch = ahead.popleft().result()
                    ahead.extend(submit(step) for step in islice(steps, 1))
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def _in_processes(self, steps: Iterable[int]) -> Iterator[Batch]:
        # Every worker makes its own share of the rows of every step, so that it reads from few
        # streams; DataLoader asks the workers in turn, so worker w always gets share w.
        shares = min(self.num_workers, self.last - self.first)
        cuts = [self.first + (self.last - self.first) * i // shares for i in range(shares + 1)]
        tasks = ((step, cuts[i], cuts[i + 1]) for step in steps for i in range(shares))
        loader = DataLoader(
            _Tasks(self.rows),
            batch_size=None,
            sampler=_Once(tasks),
            num_workers=shares,
            prefetch_factor=max(1, self.prefetch),
            # torch_xla cannot live in a forked process.
            multiprocessing_context="spawn",
        )
        parts: list[Batch] = []
        for part in loader:
            if isinstance(part, str):
                raise UserError(part)
            parts.append(part)
            if len(parts) == shares:
                yield {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                parts = []


@dataclass(frozen=True)
class _Tasks(Dataset[Any]):
    """What a worker process does: a task in, rows or the text of a ``UserError`` out."""

    rows: Rows

    def __getitem__(self, task: tuple[int, int, int]) -> Batch | str:
        try:
            return self.rows(*task)
        except UserError as error:
            # DataLoader would bury the message under a traceback of the worker.
            return str(error)


@dataclass(frozen=True)
class _Once:
    """A sampler in DataLoader's sense from an iterator."""

    tasks: Iterator[tuple[int, int, int]]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return self.tasks
