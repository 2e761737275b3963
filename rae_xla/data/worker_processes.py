"""Worker processes that end with the process that started them, and with nothing else.

A launcher that stops a run signals the whole process group: torchrun sends SIGTERM, a terminal
SIGINT. The main process then finishes its step and saves, for which it still needs its workers.
Therefore workers ignore both signals from their first instruction on. The process that started them
ends them with SIGKILL, which costs nothing: they hold neither locks nor files that others read.
Workers that are still running when their parent is killed end by themselves, because their pipe is
closed.

Like ``batch_builder``, this module does not import torch.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, resource_tracker
from multiprocessing.context import SpawnProcess
from typing import Any

_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals that reach a whole process group, and to which only its main process reacts."""


class WorkerProcesses:
    """Processes started with ``spawn``, and ended together by ``close``."""

    def __init__(self) -> None:
        # spawn: torch_xla does not work in a forked process, and a fork would copy the locks of
        # gcsfs's threads
        self._context = get_context("spawn")
        self._processes: list[SpawnProcess] = []
        # At exit multiprocessing sends SIGTERM to its processes and waits for them: it would wait
        # forever. Functions that are registered later run earlier.
        atexit.register(self.close)

    def start(self, function: Callable[..., None], *arguments: Any) -> None:
        """Start a process that calls ``function``; both must pickle."""
        process = self._context.Process(target=_run, args=(function, arguments), daemon=True)
        with _blocked_signals():  # a process inherits blocked signals
            process.start()
        self._processes.append(process)

    def close(self) -> None:
        """End all processes and wait for their end."""
        atexit.unregister(self.close)
        processes, self._processes = self._processes, []
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            process.close()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block the group's signals within the context; those that arrive are delivered afterwards."""
    # It is started with the first process, and unblocks the signals when it has been.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    for number in _GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)
    function(*arguments)
