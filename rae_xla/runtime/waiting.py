"""Waiting for other processes: log for which ones, so that a missing one is noticed soon."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

logger = logging.getLogger(__name__)

FIRST_NOTICE = 5.0
"""Seconds after which a process logs that it waits."""

NEXT_NOTICE = 60.0
"""Seconds between later notices."""

_JOINED = "rae_xla/joined"  # key in the store, with the index of a process that was started
_EXCHANGES = "rae_xla/exchanges"  # key in the store: exchanges that a process has begun
_SHOWN = 8  # processes in a message


@contextmanager
def waiting_notice(describe: Callable[[], str], first: float | None = None) -> Iterator[None]:
    """Log from a thread, after some seconds and then every minute, that the block is waiting.

    Args:
        describe: returns what this process waits for; it is called in the thread.
        first: seconds until the first line; None: ``FIRST_NOTICE``.
    """
    done = threading.Event()
    began = time.monotonic()

    def report() -> None:
        pause = FIRST_NOTICE if first is None else first
        while not done.wait(pause):
            logger.warning("%s (%.0f s so far)", describe(), time.monotonic() - began)
            pause = NEXT_NOTICE

    thread = threading.Thread(target=report, name="rae-xla-waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def wait_for_all(
    store: dist.Store, index: int, count: int, timeout: timedelta, advice: str
) -> list[int]:
    """Wait until all processes of a run have called this; log for which ones.

    Args:
        store: that all of them share.
        index: number of this process.
        count: number of processes.
        timeout: when to give up.
        advice: for the log: what to do if they do not come.

    Returns:
        The processes that did not call it in time.

    Raises:
        DistNetworkError: the connection to the store is lost.
    """
    began = time.monotonic()
    store.set(f"{_JOINED}/{index}", "")
    keys = [f"{_JOINED}/{other}" for other in range(count)]
    pause = FIRST_NOTICE
    while True:
        left = timeout.total_seconds() - (time.monotonic() - began)
        try:
            store.wait(keys, timedelta(seconds=max(0.01, min(pause, left))))
            return []
        except dist.DistStoreError:  # not all of them within this time
            missing = [other for other, key in enumerate(keys) if not store.check([key])]
        if missing and left <= pause:
            return missing
        if missing:
            waited = time.monotonic() - began
            logger.warning(
                "process %d of %d waits for %s, which has not started or does not reach this one "
                "(%.0f s so far, at most %.0f): %s",
                *(index, count, name_processes(missing), waited, timeout.total_seconds(), advice),
            )
        pause = NEXT_NOTICE


@contextmanager
def exchange_notice() -> Iterator[None]:
    """Log which processes have not begun the exchange of this block, while this one waits.

    Every process of the default group must enter it, equally often.
    """
    index, count = dist.get_rank(), dist.get_world_size()
    arrived: int | None = None
    store: dist.Store | None = None
    with suppress(RuntimeError):  # a store that is gone; the exchange itself reports that
        store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
        arrived = store.add(f"{_EXCHANGES}/{index}", 1)

    def describe() -> str:
        others = [other for other in range(count) if other != index]
        with suppress(RuntimeError):
            if store is not None and arrived is not None:
                began = {other: store.add(f"{_EXCHANGES}/{other}", 0) for other in others}
                others = [other for other in others if began[other] < arrived] or others
        return (
            f"process {index} of {count} waits for {name_processes(others)}, which may be loading "
            "or compiling: its log says so"
        )

    with waiting_notice(describe):
        yield


def name_processes(indices: Sequence[int]) -> str:
    """Return ``process 3``, or ``processes 1, 2 and 5``; of many, the first ones."""
    if len(indices) == 1:
        return f"process {indices[0]}"
    if len(indices) > _SHOWN:
        first = ", ".join(map(str, indices[:_SHOWN]))
        return f"processes {first} and {len(indices) - _SHOWN} more"
    return f"processes {', '.join(map(str, indices[:-1]))} and {indices[-1]}"
