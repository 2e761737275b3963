"""Apply a function to many items in worker processes, with the results in order.

Unlike the pools of the standard library, workers share no queue or lock; each has its own pipe. So
a killed worker is noticed at once, and all workers end with the main process, however that ends.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from rae_xla.data.worker_processes import WorkerProcesses
from rae_xla.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8
"""Items per worker that are done or in progress beyond the result in use."""

WORKER_DIED = (
    "a worker process died (killed for lack of memory?): run the same command again, with a "
    "smaller --workers if memory is short"
)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """Yield ``map(function, items)``, computed by ``workers`` processes if there is more than one.

    The function, items and results must pickle; the function is sent to each worker once.

    Raises:
        UserError: the function raised one, or a worker died. An ``OSError`` of the function is
            raised as such, any other exception as a ``RuntimeError`` with the traceback.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    processes = WorkerProcesses()
    idle: SimpleQueue[Connection] = SimpleQueue()
    # A thread waits for each worker, so that the workers continue while the caller is busy. The
    # pipes are closed after the threads have ended, because the threads read from them.
    with ExitStack() as pipes, ThreadPoolExecutor(workers, "rae-xla-worker") as threads:
        ahead: deque[Future[Result]] = deque()
        try:
            for _ in range(workers):
                ours, theirs = Pipe()
                pipes.enter_context(ours)
                with theirs:  # closed here; otherwise the pipe would outlive the worker
                    processes.start(_worker, theirs, function)
                idle.put(ours)
            rest = iter(items)
            ahead.extend(threads.submit(_call, idle, i) for i in islice(rest, AHEAD * workers))
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(threads.submit(_call, idle, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
            processes.close()


def _call(idle: SimpleQueue[Connection], item: Any) -> Any:
    """Send an item to an idle worker, and wait for the result."""
    pipe = idle.get()
    try:
        pipe.send(item)
        kind, value = pipe.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError(WORKER_DIED) from None
    finally:
        idle.put(pipe)  # even of a dead worker: the next thread that takes it must get an error
    if kind == "user error":
        raise UserError(value)
    if kind == "os error":
        raise value
    if kind == "bug":
        raise RuntimeError(f"in a worker process:\n{value}")
    return value


def _worker(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """Run a worker: apply the function to one item after another until the pipe is closed."""
    with pipe:
        while True:
            try:
                item = pipe.recv()
            except (EOFError, ConnectionResetError):
                return  # the main process has ended; the latter if it had not read the last reply
            reply: tuple[str, Any]
            try:
                reply = ("done", function(item))
            except UserError as error:
                reply = ("user error", str(error))
            except OSError as error:
                reply = ("os error", _plain(error))
            except Exception:
                reply = ("bug", traceback.format_exc())
            try:
                pipe.send(reply)
            except (BrokenPipeError, ConnectionResetError):
                return


def _plain(error: OSError) -> OSError:
    """Return the error as a built-in class without attributes that may not pickle."""
    if error.errno is None:  # only a message, as ``storage`` raises for buckets
        return OSError(str(error))
    return OSError(error.errno, error.strerror, error.filename)
