"""Building the next batches in the background: in a thread, or in worker processes.

Both keep ``ahead`` steps in progress beyond the one in use, return them in order, and stop when the
generator is closed. Like ``batch_builder``, this module does not import torch.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from ctypes import c_uint8
from itertools import chain, islice, pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from rae_xla.data.bad_samples import BadSample
from rae_xla.data.batch_builder import Arrays, BatchSpec, BuiltRows
from rae_xla.data.worker_processes import WorkerProcesses
from rae_xla.errors import ConnectionLostError, UserError

ALIGNMENT = 64
"""Bytes: arrays in shared memory start at a cache line."""

WORKER_DIED = (
    "a data worker process died (killed for lack of memory?): resume with a smaller "
    "data.num_workers or data.prefetch"
)

Layout = list[tuple[str, tuple[int, ...], str]]
"""Name, shape and dtype of the arrays of a batch."""


def build_in_thread(
    spec: BatchSpec, steps: Iterator[int], first: int, last: int, ahead: int
) -> Generator[BuiltRows, None, None]:
    """Yield rows ``first:last`` of every step, built in a thread.

    Args:
        spec: what the batches hold.
        steps: the steps to build, in order.
        first: first row.
        last: row after the last.
        ahead: number of steps to build ahead.
    """
    builder = spec.open(first, last)
    thread = ThreadPoolExecutor(1, "rae-xla-data")

    def submit(count: int) -> Iterator[Future[BuiltRows]]:
        return (thread.submit(builder.build, step) for step in islice(steps, count))

    pending = deque(submit(max(1, ahead)))
    try:
        while pending:
            batch = pending.popleft().result()
            pending.extend(submit(1))
            yield batch
    finally:
        builder.close()
        # Without waiting: the thread may itself be waiting for a bucket.
        thread.shutdown(wait=False, cancel_futures=True)


def build_in_processes(
    spec: BatchSpec, steps: Iterator[int], first: int, last: int, ahead: int, workers: int
) -> Generator[BuiltRows, None, None]:
    """Yield rows ``first:last`` of every step, built in worker processes.

    Every worker builds a fixed share of the rows, so that it reads from few streams, and writes
    them to their places in a batch in shared memory. Workers share no queue, lock or thread, so one
    can end, or be killed, at any moment.

    Args:
        spec: what the batches hold.
        steps: the steps to build, in order.
        first: first row.
        last: row after the last.
        ahead: number of steps to build ahead.
        workers: number of processes.

    Yields:
        The rows; their arrays are valid until the next step is requested.

    Raises:
        UserError: a worker raised one, or died.
    """
    first_step = next(steps, None)
    if first_step is None:
        return
    # One row built here gives the layout of all, and reports a broken data set before any process
    # starts.
    with closing(spec.open(first, first + 1, look_ahead=0)) as builder:
        row = builder.build(first_step).arrays
    layout: Layout = [(name, (last - first, *a.shape[1:]), a.dtype.str) for name, a in row.items()]
    context = get_context("spawn")
    # A slot for every batch in progress and one for the batch in use. RawArray unlinks its file at
    # once, so nothing is left behind however the run ends.
    ahead = max(1, ahead)
    slots = [context.RawArray(c_uint8, _num_bytes(layout)) for _ in range(ahead + 1)]
    views = [_views(slot, layout) for slot in slots]
    free, pending, steps = deque(range(ahead + 1)), deque[int](), chain([first_step], steps)

    workers = min(workers, last - first)
    cuts = [first + (last - first) * i // workers for i in range(workers + 1)]
    processes = WorkerProcesses()
    pipes: list[Connection] = []

    def submit(count: int) -> None:
        for step in islice(steps, count):
            pending.append(free.popleft())
            for pipe in pipes:
                _send(pipe, (pending[-1], step))

    try:
        for low, high in pairwise(cuts):
            ours, theirs = context.Pipe()
            processes.start(_worker, theirs, spec, low, high, first, slots, layout)
            theirs.close()  # otherwise the pipe would stay open when the worker ends
            pipes.append(ours)
        submit(ahead)
        while pending:
            bad = [sample for pipe in pipes for sample in _receive(pipe)]
            slot = pending.popleft()
            submit(1)
            yield BuiltRows(views[slot], bad)
            free.append(slot)
    finally:
        processes.close()
        for pipe in pipes:
            pipe.close()


def _send(pipe: Connection, task: tuple[int, int]) -> None:
    """Send a slot and a step to a worker."""
    try:
        pipe.send(task)
    except (BrokenPipeError, ConnectionResetError):
        raise UserError(WORKER_DIED) from None


def _receive(pipe: Connection) -> list[BadSample]:
    """Wait for a worker's share of the oldest step; return the bad samples in it."""
    try:
        kind, content = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(WORKER_DIED) from None
    if kind == "connection lost":
        raise ConnectionLostError(content)
    if kind == "user error":
        raise UserError(content)
    if kind == "bug":
        raise RuntimeError(f"in a data worker process:\n{content}")
    bad: list[BadSample] = content
    return bad


def _worker(
    pipe: Connection,
    spec: BatchSpec,
    low: int,
    high: int,
    first: int,
    slots: list[Any],
    layout: Layout,
) -> None:
    """Run a worker: build rows ``low:high`` of each requested step until the pipe is closed."""
    views = [_views(slot, layout) for slot in slots]
    builder = spec.open(low, high)
    while True:
        try:
            slot, step = pipe.recv()
        except (EOFError, ConnectionResetError):
            break  # the main process has ended
        reply: tuple[str, Any]
        try:
            built = builder.build(step)
            for name, part in built.arrays.items():
                views[slot][name][low - first : high - first] = part
            reply = ("done", built.bad)
        except ConnectionLostError as error:
            reply = ("connection lost", str(error))
        except UserError as error:
            reply = ("user error", str(error))
        except Exception:
            reply = ("bug", traceback.format_exc())
        try:
            pipe.send(reply)
        except (BrokenPipeError, ConnectionResetError):
            break
    builder.close()


def _num_bytes(layout: Layout) -> int:
    return sum(_padded_bytes(shape, dtype) for _, shape, dtype in layout)


def _views(memory: Any, layout: Layout) -> Arrays:
    """Return arrays of this layout, one after another in ``memory``."""
    arrays, offset = {}, 0
    for name, shape, dtype in layout:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(memory, dtype, count, offset).reshape(shape)
        offset += _padded_bytes(shape, dtype)
    return arrays


def _padded_bytes(shape: tuple[int, ...], dtype: str) -> int:
    length = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-length // ALIGNMENT) * ALIGNMENT
