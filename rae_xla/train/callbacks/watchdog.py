"""Watchdog: ends a run that makes no progress, with a report of what it was doing.

A training can hang: a read never returns, or a host died while the others wait for it inside a
collective. No error is raised then, and the machines cost money. The trainer reports every activity
to the watchdog as it begins. If the next one does not begin in time, the watchdog's thread writes
down the current activity and the stack of every thread, and ends the process, so that a supervisor
can restart it. In a multi-host run each host ends by itself: the hosts that wait for a dead one
hang as well.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from rae_xla.train.callbacks.base import Callback

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer

EXIT_HUNG = 76
"""Exit status of a run that the watchdog ended: started again, it resumes."""

LONG = 12
"""Number of timeouts that an activity may take which compiles or is long by nature."""


@dataclass(frozen=True)
class Activity:
    """Something that a run does.

    Attributes:
        name: for the report, after "the process was".
        look_at: for the report: likely causes if it does not end.
        timeouts: number of timeouts that it may take.
    """

    name: str
    look_at: str
    timeouts: int = 1


STARTING = Activity("starting", "the first use of the devices, and the other hosts", LONG)
HOSTS = Activity(
    "waiting for the other hosts",
    "the host that is missing: one that ended, or whose hang-*.txt names another activity",
)
DATA = Activity(
    "waiting for data",
    "the storage of data.train (`rae-xla doctor --config ...` reads from it), and whether the "
    "worker processes (data.num_workers) are alive",
)
STEP = Activity(
    "running a step, or waiting for the devices to finish an earlier one",
    "the other hosts, if there are any: when one has died, all others wait for it in their next "
    "collective, so find the host whose log ends differently; otherwise the devices (`rae-xla "
    "doctor`)",
)
FIRST_STEP = Activity("compiling a step, or running it for the first time", STEP.look_at, LONG)
CHECKPOINT = Activity(
    "saving a checkpoint",
    "the storage of the checkpoints (`rae-xla doctor --config ... --results-dir ...` writes to it)",
)
PREVIEW = Activity("generating a preview", STEP.look_at, LONG)
EVALUATION = Activity("evaluating", f"{DATA.look_at}; {STEP.look_at}", LONG)


@dataclass(frozen=True)
class _CurrentActivity:
    activity: Activity
    step: int
    since: datetime
    extra_seconds: float

    def limit(self, timeout: float) -> float:
        return self.activity.timeouts * timeout + self.extra_seconds


class Watchdog:
    """Ends the process if no new activity begins in time; a context manager.

    Args:
        timeout: seconds an activity may take, times ``Activity.timeouts``; 0 disables the watchdog.
        folder: where ``hang-<process>.txt`` is written.
        process_index: of this process.
    """

    def __init__(self, timeout: float, folder: Path, process_index: int = 0) -> None:
        self._timeout, self._process = timeout, process_index
        self._report = folder / f"hang-{process_index}.txt"
        self._poll = min(timeout / 4, 10.0)
        self._closed = threading.Event()
        self.on_hang: Callable[[str], None] | None = None
        """Called with the report before the process ends; must return soon."""
        self.begin(STARTING, 0)

    def begin(self, activity: Activity, step: int, extra_seconds: float = 0.0) -> None:
        """Report that a new activity begins.

        Args:
            activity: what begins.
            step: steps taken.
            extra_seconds: added to the time that the activity may take.
        """
        # A new object each time: its identity shows the thread that there was progress.
        self._current = _CurrentActivity(activity, step, datetime.now(timezone.utc), extra_seconds)

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self.begin(STARTING, self._current.step)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """Count the time without progress in short intervals.

        The clock alone would also count the time for which the process was suspended.
        """
        seen, idle = self._current, 0.0
        while not self._closed.is_set():
            # Native code that holds the interpreter lock stops this thread as well. faulthandler
            # does not need the lock: it writes the stacks and ends the process with status 1.
            if sys.__stderr__ is not None:
                limit = 2 * LONG * self._timeout + seen.extra_seconds
                with suppress(ValueError, OSError):  # stderr may be closed
                    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
            self._closed.wait(self._poll)
            if self._current is not seen:
                seen, idle = self._current, 0.0
                continue
            idle += self._poll
            if idle > seen.limit(self._timeout):
                self._end(seen, idle)

    def _end(self, current: _CurrentActivity, idle: float) -> None:
        text = self._describe(current, idle)
        with suppress(Exception):  # the process must end, whatever cannot be written
            _write_stacks(sys.__stderr__, text)
        with suppress(Exception), self._report.open("a", encoding="utf-8") as file:
            _write_stacks(file, text)
        with suppress(Exception):
            if self.on_hang is not None:
                self.on_hang(text.strip())
        # Not by an exception: hanging native code cannot be unwound.
        os._exit(EXIT_HUNG)

    def _describe(self, current: _CurrentActivity, idle: float) -> str:
        activity = current.activity
        times = f", times {activity.timeouts} for this activity" if activity.timeouts > 1 else ""
        return (
            f"\nrae-xla: no progress for {idle:.0f} s (process {self._process}, pid {os.getpid()})"
            f": after step {current.step} the process was {activity.name}, since "
            f"{current.since:%Y-%m-%d %H:%M:%S} UTC. The limit is "
            f"{current.limit(self._timeout):.0f} s "
            f"(training.hang_timeout={self._timeout:g}{times}).\n"
            f"Look at: {activity.look_at}.\n"
            f"The process exits with status {EXIT_HUNG}; started again, the run resumes from its "
            f"newest checkpoint. This report: {self._report}\n"
        )


def _write_stacks(file: IO[str] | None, text: str) -> None:
    if file is None:
        return
    file.write(text)
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.flush()


class WatchdogCallback(Callback):
    """Connects the watchdog to the tracker, so that a hang is reported to wandb as well."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_train_start(self, trainer: Trainer) -> None:
        """Report hangs to the tracker."""
        self._watchdog.on_hang = trainer.tracker.report_hang

    def close(self, error: BaseException | None) -> None:
        """Disconnect the tracker."""
        self._watchdog.on_hang = None
