"""Profiles of a few steps of a run, asked for beforehand or while it runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType

from rae_xla.runtime import Runtime

ON_SIGNAL = 5
"""Steps that a SIGUSR2 has profiled, beginning with the next one."""


class Profiler:
    """Records steps into ``profile/`` of the results folder; use it with ``with``.

    Args:
        runtime: what is profiled.
        folder: the results folder.
        steps: the first and the last step, counted from 1, that process 0 records; all processes
            do the same work. A SIGUSR2 is for the process that gets it.
        pause: entered where the devices must have finished and time is not training time.
        say: prints a line.
    """

    def __init__(
        self,
        runtime: Runtime,
        folder: Path,
        steps: tuple[int, int] | None,
        pause: Callable[[], AbstractContextManager[None]],
        say: Callable[[str], None],
    ) -> None:
        self._runtime, self._folder, self._pause, self._say = runtime, folder, pause, say
        self._steps = steps if runtime.process_index == 0 else None
        self._asked = False
        self._running: ExitStack | None = None
        self._first, self._last = 0, 0
        self._into = folder
        self._before: object = None

    def __enter__(self) -> Profiler:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR2, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR2, self._before)  # type: ignore[arg-type]
        if self._running is not None:
            self._stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def before(self, step: int) -> None:
        """Step number ``step``, counted from 1, is about to be taken."""
        if self._running is not None and step > self._last:
            with self._pause():
                self._stop()
        if self._running is not None:
            return
        if self._asked:
            self._start(step, step + ON_SIGNAL - 1)
        elif self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            self._start(step, self._steps[1])
        self._asked = False

    def _start(self, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._into = self._folder / "profile" / f"steps-{first}-{last}"
        with self._pause(), ExitStack() as stack:
            try:
                stack.enter_context(self._runtime.profile(self._into))
            except Exception as error:  # a profile is not worth a run
                self._fail(error)
                return
            self._running = stack.pop_all()
        self._say(f"step {first - 1}: profiling up to step {last}")

    def _stop(self) -> None:
        assert self._running is not None
        running, self._running = self._running, None
        try:
            running.close()
        except Exception as error:
            self._fail(error)
            return
        self._say(
            f"profile of steps {self._first} to {self._last} (unless the run ended before): "
            f"tensorboard --logdir {self._into}"
        )

    def _fail(self, error: Exception) -> None:
        self._steps = None
        self._say(f"no profile: {error}")
