"""Notices that a run does not move any more, says what it was at, and ends it.

A training can stand still for ever: a read that never returns, a host that died and for which the
others wait inside a collective. Nothing raises an error then, and a machine is paid for. Here a
thread is told of every thing the run begins; if nothing new begins for too long, it writes down
what was going on, with the stack of every thread, and ends the process, so that whoever supervises
it can start it again. Of several hosts each ends by itself: where one is gone the others wait for
it, and their own watchdogs see that.
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
from typing import IO

EXIT_HUNG = 76
"""Exit status of a run that its watchdog ended: start it again, and it goes on from its newest
checkpoint.
"""

COMPILING = 12
"""So many times the timeout may pass where something is compiled, or a long work begins."""


@dataclass(frozen=True)
class Activity:
    """A thing that a run is at.

    Attributes:
        name: for the report, after "the process was".
        look_at: where its standing still may come from.
        patience: for how many timeouts it may go on.
    """

    name: str
    look_at: str
    patience: int = 1


STARTING = Activity("starting", "the first use of the devices, and the other hosts", COMPILING)
HOSTS = Activity(
    "waiting for word from the other hosts",
    "the host that is missing: one that ended, or that wrote a hang-*.txt of something else",
)
DATA = Activity(
    "waiting for data",
    "the storage of data.train (`rae-xla doctor --config ...` reads from it), and whether the "
    "decoding processes (data.num_workers) still live",
)
STEP = Activity(
    "at a step, or waiting for the devices to finish an earlier one",
    "the other hosts, if there are any: where one has died, all others wait for it in their next "
    "collective, so look for the host whose log ends otherwise; else at the devices (`rae-xla "
    "doctor`)",
)
FIRST_STEP = Activity("compiling a step, or at it for the first time", STEP.look_at, COMPILING)
SAVING = Activity(
    "saving a checkpoint",
    "the storage of the checkpoints (`rae-xla doctor --config ... --results-dir ...` writes to it)",
)
PICTURES = Activity("making pictures", STEP.look_at, COMPILING)
EVALUATING = Activity("evaluating", f"{DATA.look_at}; {STEP.look_at}", COMPILING)


@dataclass(frozen=True)
class _Begun:
    activity: Activity
    step: int
    at: datetime
    more_seconds: float


class Watchdog:
    """Ends the process when nothing new begins; use it with ``with``.

    Args:
        timeout: seconds without anything new; 0 watches nothing.
        folder: where ``hang-<process>.txt`` is written.
        process_index: of this process.
    """

    def __init__(self, timeout: float, folder: Path, process_index: int = 0) -> None:
        self._timeout, self._process = timeout, process_index
        self._report = folder / f"hang-{process_index}.txt"
        self._poll = min(timeout / 4, 10.0)
        self._over = threading.Event()
        self.tell: Callable[[str], None] | None = None
        """Who else is told, before the process ends; must return soon."""
        self.begin(STARTING, 0)

    def begin(self, activity: Activity, step: int, more_seconds: float = 0.0) -> None:
        """Something new is about to be done.

        Args:
            activity: what.
            step: steps taken by now.
            more_seconds: that it may take beyond its patience.
        """
        # A new object each time: that is how the thread sees that something has moved.
        self._begun = _Begun(activity, step, datetime.now(timezone.utc), more_seconds)

    def __enter__(self) -> Watchdog:
        if self._timeout > 0:
            self.begin(STARTING, self._begun.step)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        """Count the time in which nothing moves, by naps: the clock alone would count what a
        process was suspended for, too.
        """
        seen, still = self._begun, 0.0
        while not self._over.is_set():
            # Should Python itself stand still (native code that keeps its lock), this thread does
            # too. What is armed here is no Python: it writes the stacks and ends with status 1.
            if sys.__stderr__ is not None:
                patience = 2 * COMPILING * self._timeout + seen.more_seconds
                with suppress(ValueError, OSError):  # it may be closed
                    faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
            self._over.wait(self._poll)
            if self._begun is not seen:
                seen, still = self._begun, 0.0
                continue
            still += self._poll
            if still > seen.activity.patience * self._timeout + seen.more_seconds:
                self._end(seen, still)

    def _end(self, begun: _Begun, still: float) -> None:
        text = self._text(begun, still)
        with suppress(Exception):  # whatever cannot be written, the process must end
            _write(sys.__stderr__, text)
        with suppress(Exception), self._report.open("a", encoding="utf-8") as file:
            _write(file, text)
        with suppress(Exception):
            if self.tell is not None:
                self.tell(text.strip())
        # What hangs in native code cannot be unwound.
        os._exit(EXIT_HUNG)

    def _text(self, begun: _Begun, still: float) -> str:
        allowed = begun.activity.patience * self._timeout + begun.more_seconds
        return (
            f"\nrae-xla: nothing has moved for {still:.0f} s (process {self._process}, pid "
            f"{os.getpid()}): after step {begun.step} the process was {begun.activity.name}, since "
            f"{begun.at:%Y-%m-%d %H:%M:%S} UTC. {allowed:.0f} s were allowed "
            f"(training.hang_timeout={self._timeout:g}"
            + (
                f", {begun.activity.patience} times for this)"
                if begun.activity.patience > 1
                else ")"
            )
            + f".\nLook at: {begun.activity.look_at}.\n"
            f"The process ends with status {EXIT_HUNG}; started again, the run goes on from its "
            f"newest checkpoint. This report: {self._report}\n"
        )


def _write(file: IO[str] | None, text: str) -> None:
    if file is None:
        return
    file.write(text)
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.flush()
