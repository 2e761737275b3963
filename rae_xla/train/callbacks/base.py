"""The interface of a callback, and the list that calls several in order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rae_xla.train.metrics_window import DeviceMetrics, WindowSummary

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer

logger = logging.getLogger(__name__)


class Callback:
    """Something that happens around the steps of a training; override the hooks that it needs.

    Every process of a run calls every hook, in the same order: a hook may use collectives.
    """

    def on_train_start(self, trainer: Trainer) -> None:
        """Run before the first step; the state is on the devices."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Run before a step; ``trainer.state.step`` steps have been taken."""

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Run after a step was dispatched; ``trainer.state.step`` includes it.

        The devices may still compute it: reading ``metrics`` waits for them.
        """

    def on_log(self, trainer: Trainer, summary: WindowSummary) -> None:
        """Run after the metrics of a window were logged, one step late."""

    def on_train_end(self, trainer: Trainer) -> None:
        """Run after the last step, also if the run is stopped; not if an exception ends it."""

    def close(self, error: BaseException | None) -> None:
        """Release resources, in any case; ``error`` is the exception that ends the training."""


class CallbackList(Callback):
    """Calls each hook of several callbacks, in order; ``close`` in reverse order."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self.callbacks = list(callbacks)

    def on_train_start(self, trainer: Trainer) -> None:
        """Call the hook of every callback."""
        for callback in self.callbacks:
            callback.on_train_start(trainer)

    def on_step_start(self, trainer: Trainer) -> None:
        """Call the hook of every callback."""
        for callback in self.callbacks:
            callback.on_step_start(trainer)

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Call the hook of every callback."""
        for callback in self.callbacks:
            callback.on_step_end(trainer, metrics)

    def on_log(self, trainer: Trainer, summary: WindowSummary) -> None:
        """Call the hook of every callback."""
        for callback in self.callbacks:
            callback.on_log(trainer, summary)

    def on_train_end(self, trainer: Trainer) -> None:
        """Call the hook of every callback."""
        for callback in self.callbacks:
            callback.on_train_end(trainer)

    def close(self, error: BaseException | None) -> None:
        """Close every callback, the last one first, even if one of them fails.

        A failure is logged. It is raised if no other exception ends the training.
        """
        failure: BaseException | None = None
        for callback in reversed(self.callbacks):
            try:
                callback.close(error)
            except BaseException as own:
                logger.exception("closing %s failed", type(callback).__name__)
                failure = failure or own
        if failure is not None and error is None:
            raise failure

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the callbacks when the context ends, with the exception that ends it, if any."""
        try:
            yield
        except BaseException as error:
            self.close(error)
            raise
        self.close(None)
