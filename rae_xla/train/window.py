"""The figures of the steps between two log lines."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from rae_xla.runtime import Runtime
from rae_xla.train.plan import Plan
from rae_xla.train.step import Step

Figures = dict[str, float]

SKIPPED = "/skipped"


@dataclass(frozen=True)
class Window:
    """What the steps between two log lines amounted to.

    Attributes:
        step: steps taken when it ended.
        figures: means over its steps by name; of ``…/skipped``, the sum.
        skipped_in_a_row: steps up to its last, or up to the worst one in it, that were skipped one
            after another.
    """

    step: int
    figures: Figures
    skipped_in_a_row: int


class Windows:
    """Gathers the metrics of steps on the devices and reads them one step later.

    The step after the window is on its way to the devices by then, so reading does not stall them.
    A step that compiles is left out of the timing.
    """

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self._plan, self._runtime = plan, runtime
        self._closed: tuple[int, list[tuple[Step, Tensor]], Figures] | None = None
        self._timed_steps: set[int] = set()
        self._in_a_row = 0
        self._begin()

    def _begin(self) -> None:
        self._metrics: list[tuple[Step, Tensor]] = []
        self._timed, self._waited, self._paused = 0, 0.0, 0.0
        self._since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent here is time without data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent here is no training time."""
        self._runtime.synchronize()
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, step: Step, metrics: Tensor) -> None:
        """One step's metrics, still on the devices."""
        self._metrics.append((step, metrics))
        self._timed += 1
        if id(step) not in self._timed_steps:  # its first time
            self._runtime.synchronize()
            self._timed_steps.add(id(step))
            self._timed, self._waited, self._paused = 0, 0.0, 0.0
            self._since = time.perf_counter()

    def close(self, step: int, scalars: Figures) -> None:
        """End the window with ``step``, the number of steps taken, and begin the next one."""
        seconds = time.perf_counter() - self._since - self._paused
        figures: Figures = {**scalars, "epoch": step / self._plan.per_epoch}
        if self._timed:
            figures |= {
                "perf/step_time": seconds / self._timed,
                "perf/images_per_second": self._timed * self._plan.global_batch / seconds,
                "perf/data_wait": self._waited / seconds,
            }
        figures["perf/compilations"] = self._runtime.compilations()
        figures["perf/fallbacks"] = sum(self._runtime.fallbacks().values())
        self._closed = (step, self._metrics, figures)
        self._begin()

    def take(self) -> Window | None:
        """The closed window, if there is one."""
        if self._closed is None:
            return None
        number, metrics, figures = self._closed
        self._closed = None
        steps = self._read(metrics)
        worst = 0
        for step in steps:
            self._in_a_row = self._in_a_row + 1 if _skipped(step) else 0
            worst = max(worst, self._in_a_row)
        return Window(number, _summary(steps) | figures, worst)

    def skipped_up_to_now(self) -> int:
        """How many steps in a row, the last one taken included, were skipped. Waits for them."""
        closed = self._closed[1] if self._closed is not None else []
        count = self._in_a_row
        for step in self._read([*closed, *self._metrics]):
            count = count + 1 if _skipped(step) else 0
        return count

    def _read(self, metrics: Sequence[tuple[Step, Tensor]]) -> list[Figures]:
        vectors = self._runtime.fetch([vector for _, vector in metrics])
        return [
            dict(zip(step.names, vector.tolist(), strict=True))
            for (step, _), vector in zip(metrics, vectors, strict=True)
        ]


def _skipped(step: Figures) -> bool:
    return any(value for name, value in step.items() if name.endswith(SKIPPED))


def _summary(steps: Sequence[Figures]) -> Figures:
    """Mean of each figure over the steps that have it and were not skipped; skips are summed."""
    summary: Figures = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        skipped = name.rpartition("/")[0] + SKIPPED
        values = [step[name] for step in steps if name in step and not step.get(skipped)]
        if name.endswith(SKIPPED):
            summary[name] = sum(step.get(name, 0.0) for step in steps)
        elif finite := [value for value in values if math.isfinite(value)]:
            summary[name] = sum(finite) / len(finite)
    return summary
