"""Make the rows of the next steps while the caller uses this one: in a thread, or in processes.

Both keep ``ahead`` steps in the making beyond the one handed out, hand them out in order, and stop
when the generator is closed. Like ``rows``, this module does without torch.
"""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from ctypes import c_uint8
from itertools import chain, islice, pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import numpy as np

from rae_xla.data.faults import BadSample
from rae_xla.data.rows import Arrays, Made, Rows
from rae_xla.errors import UserError

ALIGNMENT = 64
"""Bytes: arrays in shared memory start at a cache line."""

Layout = list[tuple[str, tuple[int, ...], str]]
"""Name, shape and dtype of the arrays of a batch."""


def in_thread(
    rows: Rows, steps: Iterator[int], first: int, last: int, ahead: int
) -> Generator[Made, None, None]:
    """Rows ``first:last`` of every step, made in one thread beside the caller's."""
    maker = rows.open(first, last)
    thread = ThreadPoolExecutor(1, "rae-xla-data")

    def submit(count: int) -> Iterator[Future[Made]]:
        return (thread.submit(maker.make, step) for step in islice(steps, count))

    pending = deque(submit(max(1, ahead)))
    try:
        while pending:
            batch = pending.popleft().result()
            pending.extend(submit(1))
            yield batch
    finally:
        maker.close()
        # Without waiting: the thread may be waiting for a bucket itself.
        thread.shutdown(wait=False, cancel_futures=True)


def in_processes(
    rows: Rows, steps: Iterator[int], first: int, last: int, ahead: int, workers: int
) -> Generator[Made, None, None]:
    """The same from ``workers`` processes; the arrays are valid until the next is asked for.

    Every worker makes its own share of the rows of every step, so that it reads from few streams,
    and writes them where they belong in a batch in shared memory. No queue, lock or thread is
    shared, so a worker can end, or be ended, at any moment.

    Raises:
        UserError: what a worker raised, or that a worker died.
    """
    opening = next(steps, None)
    if opening is None:
        return
    # Made here, one row tells the layout of all, and a broken data set before a process starts.
    with closing(rows.open(first, first + 1, look_ahead=0)) as maker:
        row = maker.make(opening).arrays
    layout: Layout = [(name, (last - first, *a.shape[1:]), a.dtype.str) for name, a in row.items()]
    context = get_context("spawn")  # torch_xla cannot live in a forked process
    # One for every batch in the making and one in use. Unlinked as soon as it is made, so that
    # nothing is left behind however the run ends.
    ahead = max(1, ahead)
    slots = [context.RawArray(c_uint8, _length(layout)) for _ in range(ahead + 1)]
    views = [_views(slot, layout) for slot in slots]
    free, pending, steps = deque(range(ahead + 1)), deque[int](), chain([opening], steps)

    workers = min(workers, last - first)
    cuts = [first + (last - first) * i // workers for i in range(workers + 1)]
    processes: list[SpawnProcess] = []
    pipes: list[Connection] = []

    def submit(count: int) -> None:
        for step in islice(steps, count):
            pending.append(free.popleft())
            for pipe in pipes:
                _send(pipe, (pending[-1], step))

    try:
        for low, high in pairwise(cuts):
            ours, theirs = context.Pipe()
            share = (rows, low, high, first, slots, layout)
            process = context.Process(target=_work, args=(theirs, *share), daemon=True)
            process.start()
            theirs.close()  # else the end of the worker would not end the pipe
            processes.append(process)
            pipes.append(ours)
        submit(ahead)
        while pending:
            bad = [sample for pipe in pipes for sample in _receive(pipe)]
            slot = pending.popleft()
            submit(1)
            yield Made(views[slot], bad)
            free.append(slot)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


WORKER_DIED = (
    "a data worker process died (killed for lack of memory?): resume with a smaller "
    "data.num_workers or data.prefetch"
)


def _send(pipe: Connection, task: tuple[int, int]) -> None:
    """Ask a worker for its share of a step."""
    try:
        pipe.send(task)
    except (BrokenPipeError, ConnectionResetError):
        raise UserError(WORKER_DIED) from None


def _receive(pipe: Connection) -> list[BadSample]:
    """Wait until a worker has done its share of the oldest step; what it had to replace there."""
    try:
        kind, content = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(WORKER_DIED) from None
    if kind == "user error":
        raise UserError(content)
    if kind == "bug":
        raise RuntimeError(f"in a data worker process:\n{content}")
    bad: list[BadSample] = content
    return bad


def _work(
    pipe: Connection, rows: Rows, low: int, high: int, first: int, slots: list[Any], layout: Layout
) -> None:
    """The life of a worker: rows ``low:high`` of each step asked for, until the pipe ends."""
    # Ctrl-C reaches the whole process group; the main process decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    views = [_views(slot, layout) for slot in slots]
    maker = rows.open(low, high)
    while True:
        try:
            slot, step = pipe.recv()
        except (EOFError, ConnectionResetError):
            break  # the main process is gone
        answer: tuple[str, Any]
        try:
            made = maker.make(step)
            for name, part in made.arrays.items():
                views[slot][name][low - first : high - first] = part
            answer = ("done", made.bad)
        except UserError as error:
            answer = ("user error", str(error))
        except Exception:
            answer = ("bug", traceback.format_exc())
        try:
            pipe.send(answer)
        except (BrokenPipeError, ConnectionResetError):
            break
    maker.close()


def _length(layout: Layout) -> int:
    return sum(_padded_bytes(shape, dtype) for _, shape, dtype in layout)


def _views(memory: Any, layout: Layout) -> Arrays:
    """The arrays of ``layout``, one after another in ``memory``."""
    arrays, offset = {}, 0
    for name, shape, dtype in layout:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(memory, dtype, count, offset).reshape(shape)
        offset += _padded_bytes(shape, dtype)
    return arrays


def _padded_bytes(shape: tuple[int, ...], dtype: str) -> int:
    length = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-length // ALIGNMENT) * ALIGNMENT
