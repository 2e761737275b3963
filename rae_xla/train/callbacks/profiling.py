"""Profiling: record a few steps, configured in advance or requested by a signal."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rae_xla.runtime import Backend
from rae_xla.train.callbacks.base import Callback

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer

logger = logging.getLogger(__name__)

STEPS_ON_SIGNAL = 5
"""Number of steps recorded after a SIGUSR2, starting with the next one."""


class ProfilingCallback(Callback):
    """Records steps into ``profile/`` of the results folder.

    Args:
        backend: records what host and devices do.
        folder: the results folder.
        steps: first and last step, counted from 1, that process 0 records; all processes do the
            same work. A SIGUSR2 starts a recording in the process that receives it.
    """

    def __init__(self, backend: Backend, folder: Path, steps: tuple[int, int] | None) -> None:
        self._backend, self._folder = backend, folder
        self._steps = steps if backend.process_index == 0 else None
        self._requested = False
        self._recording: ExitStack | None = None
        self._first, self._last = 0, 0
        self._target = folder
        self._previous_handler: object = None

    def on_train_start(self, trainer: Trainer) -> None:
        """Install the signal handler."""
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGUSR2, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def on_step_start(self, trainer: Trainer) -> None:
        """Start or end a recording."""
        step = trainer.state.step + 1
        if self._recording is not None and step > self._last:
            with trainer.window.pause():
                self._stop()
        if self._recording is not None:
            return
        if self._requested:
            self._start(trainer, step, step + STEPS_ON_SIGNAL - 1)
        elif self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            self._start(trainer, step, self._steps[1])
        self._requested = False

    def close(self, error: BaseException | None) -> None:
        """Remove the signal handler and end a recording."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGUSR2, self._previous_handler)  # type: ignore[arg-type]
        if self._recording is not None:
            self._stop()

    def _start(self, trainer: Trainer, first: int, last: int) -> None:
        self._first, self._last = first, last
        self._target = self._folder / "profile" / f"steps-{first}-{last}"
        with trainer.window.pause(), ExitStack() as stack:
            try:
                stack.enter_context(self._backend.profile(self._target))
            except Exception as error:  # a profile must not end a run
                self._fail(error)
                return
            self._recording = stack.pop_all()
        logger.info("step %d: profiling up to step %d", first - 1, last)

    def _stop(self) -> None:
        assert self._recording is not None
        recording, self._recording = self._recording, None
        try:
            recording.close()
        except Exception as error:
            self._fail(error)
            return
        logger.info(
            "profile of steps %d to %d (fewer if the run ended before): tensorboard --logdir %s",
            self._first,
            self._last,
            self._target,
        )

    def _fail(self, error: Exception) -> None:
        self._steps = None
        logger.warning("no profile could be recorded: %s", error)
