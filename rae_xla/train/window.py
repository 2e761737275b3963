"""The figures of the steps between two log lines."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from rae_xla.runtime import Runtime
from rae_xla.train.figures import SKIPPED
from rae_xla.train.plan import Plan
from rae_xla.train.step import Step

T = TypeVar("T")

Figures = dict[str, float]

AHEAD = 2
"""Steps the devices may have been asked for and not finished: one that they compute, and one that
is there when they come to it. With fewer they would wait for the host; more would only pile up
batches in their memory, for nothing else holds the host back.
"""


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


@dataclass
class _Taken:
    """A step that was asked for, and how to get its figures."""

    step: Step
    fetch: Callable[[], Tensor]
    figures: Figures | None = field(default=None, init=False)

    def read(self) -> Figures:
        """Its figures; waits for it."""
        if self.figures is None:
            self.figures = dict(zip(self.step.names, self.fetch().tolist(), strict=True))
        return self.figures


class Windows:
    """Gathers the metrics of steps on the devices and reads them when they are there.

    A window is read one step late: the step after it is on its way to the devices by then, so
    reading does not stall them. A step that compiles is left out of the timing.
    """

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self._plan, self._runtime = plan, runtime
        self._chip = runtime.chip()
        self._closed: tuple[int, list[_Taken], Figures] | None = None
        self._under_way: deque[_Taken] = deque()
        self._timed_steps: set[int] = set()
        self._in_a_row = 0
        self._begin()

    def _begin(self) -> None:
        self._taken: list[_Taken] = []
        self._begin_timing()

    def _begin_timing(self) -> None:
        self._timed, self._flops = 0, 0.0
        self._for_data, self._for_devices, self._paused = 0.0, 0.0, 0.0
        self._since = time.perf_counter()

    def waiting(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass on what comes; until it comes, there is no data."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._for_data += time.perf_counter() - start
            yield batch

    @contextmanager
    def _waiting_for_devices(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._for_devices += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent here is no training time."""
        with self._waiting_for_devices():
            self._runtime.synchronize()
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, step: Step, metrics: Tensor, flops_per_image: float | None = None) -> None:
        """One step's metrics, still on the devices.

        Waits until no more than ``AHEAD`` steps are under way.
        """
        taken = _Taken(step, self._runtime.fetch_later(metrics))
        self._taken.append(taken)
        self._under_way.append(taken)
        self._timed += 1
        self._flops += self._plan.global_batch * (flops_per_image or 0.0)
        if id(step) not in self._timed_steps:  # its first time
            self._runtime.synchronize()
            self._timed_steps.add(id(step))
            self._begin_timing()
        if len(self._under_way) > AHEAD:
            self._read([self._under_way.popleft()])

    def close(self, step: int, scalars: Figures) -> None:
        """End the window with ``step``, the number of steps taken, and begin the next one."""
        figures = {**scalars, "train/epoch": step / self._plan.per_epoch} | self._performance()
        figures["perf/compilations"] = self._runtime.compilations()
        figures["perf/fallbacks"] = sum(self._runtime.fallbacks().values())
        self._closed = (step, self._taken, figures)
        self._begin()

    def _performance(self) -> Figures:
        figures: Figures = {"perf/paused": self._paused}
        seconds = time.perf_counter() - self._since - self._paused
        if self._timed:
            rate = self._timed * self._plan.global_batch / seconds
            devices = self._runtime.mesh.size
            figures |= {
                "perf/step_time": seconds / self._timed,
                "perf/host_time": (seconds - self._for_data - self._for_devices) / self._timed,
                "perf/data_wait": self._for_data / seconds,
                "perf/images_per_second": rate,
                "perf/images_per_second_per_chip": rate / devices,
            }
            if self._flops and self._chip is not None:
                figures["perf/mfu"] = self._flops / seconds / (devices * self._chip.peak_flops)
        if (memory := self._runtime.memory()) is not None:
            used = memory.used if memory.peak is None else memory.peak
            figures["perf/memory_gb"] = used / 1e9
        with suppress(OSError):
            figures["perf/host_memory_gb"] = _resident_bytes() / 1e9
        return figures

    def take(self) -> Window | None:
        """The closed window, if there is one."""
        if self._closed is None:
            return None
        number, taken, figures = self._closed
        self._closed = None
        steps = self._read(taken)
        worst = 0
        for step in steps:
            self._in_a_row = self._in_a_row + 1 if _skipped(step) else 0
            worst = max(worst, self._in_a_row)
        return Window(number, _summary(steps) | figures, worst)

    def skipped_up_to_now(self) -> int:
        """How many steps in a row, the last one taken included, were skipped. Waits for them."""
        closed = self._closed[1] if self._closed is not None else []
        count = self._in_a_row
        for step in self._read([*closed, *self._taken]):
            count = count + 1 if _skipped(step) else 0
        return count

    def _read(self, taken: Sequence[_Taken]) -> list[Figures]:
        with self._waiting_for_devices():
            return [step.read() for step in taken]


def _resident_bytes() -> int:
    """Memory of this process; raises ``OSError`` where there is no /proc."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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
