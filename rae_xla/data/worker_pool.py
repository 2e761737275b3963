"""Apply a function to many items in worker processes and get the results in order.

Every worker has a pipe of its own and shares no queue or lock, so that one that is killed is
noticed at once, and all of them end with the main process, however that ends.
"""

from __future__ import annotations

import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from typing import Any, TypeVar

from rae_xla.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8
"""Items per worker that are done or in the making beyond the one handed out."""

WORKER_DIED = (
    "a worker process died (killed for lack of memory?): run the same command again, with a "
    "smaller --workers if memory is short"
)


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[Result, None, None]:
    """``map(function, items)``, computed by ``workers`` processes if that is more than one.

    The function, items and results must pickle; the function is sent to each worker once.

    Raises:
        UserError: what the function raised, or that a worker died. An ``OSError`` of the function
            comes through as one; any other error is a ``RuntimeError`` with its traceback.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    context = get_context("spawn")  # a fork would take gcsfs's threads and locks along
    processes: list[SpawnProcess] = []
    idle: SimpleQueue[Connection] = SimpleQueue()
    # A thread waits for each worker, so that the workers go on while the caller is busy. The pipes
    # are closed after the threads have ended, for they read from them.
    with ExitStack() as pipes, ThreadPoolExecutor(workers, "rae-xla-worker") as threads:
        ahead: deque[Future[Result]] = deque()
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                pipes.enter_context(ours)
                with theirs:  # closed here, else the end of the worker would not end the pipe
                    process = context.Process(target=_work, args=(theirs, function), daemon=True)
                    process.start()
                processes.append(process)
                idle.put(ours)
            rest = iter(items)
            ahead.extend(threads.submit(_ask, idle, i) for i in islice(rest, AHEAD * workers))
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(threads.submit(_ask, idle, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in ahead:
                future.cancel()
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
                process.close()


def _ask(idle: SimpleQueue[Connection], item: Any) -> Any:
    """Give an item to a worker that has nothing to do and wait for the result."""
    pipe = idle.get()
    try:
        pipe.send(item)
        kind, value = pipe.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise UserError(WORKER_DIED) from None
    finally:
        idle.put(pipe)  # a dead worker's too: whoever takes it next must not wait for ever
    if kind == "user error":
        raise UserError(value)
    if kind == "os error":
        raise value
    if kind == "bug":
        raise RuntimeError(f"in a worker process:\n{value}")
    return value


def _work(pipe: Connection, function: Callable[[Any], Any]) -> None:
    """The life of a worker: one item after another, until the pipe ends."""
    # Ctrl-C reaches the whole process group; the main process decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with pipe:
        while True:
            try:
                item = pipe.recv()
            except (EOFError, ConnectionResetError):
                return  # the main process is gone; the latter if it had not read the last answer
            answer: tuple[str, Any]
            try:
                answer = ("done", function(item))
            except UserError as error:
                answer = ("user error", str(error))
            except OSError as error:
                answer = ("os error", _plain(error))
            except Exception:
                answer = ("bug", traceback.format_exc())
            try:
                pipe.send(answer)
            except (BrokenPipeError, ConnectionResetError):
                return


def _plain(error: OSError) -> OSError:
    """The same error, of Python's own class and with nothing in it that may not pickle."""
    if error.errno is None:  # one text, such as ``storage`` gives for a bucket
        return OSError(str(error))
    return OSError(error.errno, error.strerror, error.filename)
