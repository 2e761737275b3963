"""Threads that act as the processes of a run, for code that exchanges text between processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

TIMEOUT = 30.0  # seconds


class ThreadBackend:
    """The part of ``Backend`` that exchanges text, for one of several threads."""

    def __init__(self, index: int, sent: list[str], barrier: threading.Barrier) -> None:
        self.process_index, self.process_count = index, len(sent)
        self._sent, self._barrier = sent, barrier

    def all_gather_text(self, text: str) -> list[str]:
        """Return the text of every thread; each of them must call this."""
        self._sent[self.process_index] = text
        self._barrier.wait(TIMEOUT)
        texts = list(self._sent)
        self._barrier.wait(TIMEOUT)
        return texts


def run_in_threads(count: int, function: Callable[[ThreadBackend], Any]) -> list[Any]:
    """Run ``function`` in ``count`` threads, each with a backend; return the results by index."""
    sent, barrier = [""] * count, threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        results[index] = function(ThreadBackend(index, sent, barrier))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
