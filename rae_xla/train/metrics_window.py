"""Metrics of the steps between two log lines, and how fast those steps were."""

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

from rae_xla.runtime import Backend
from rae_xla.train.cadence import Cadence
from rae_xla.train.metrics import SKIPPED
from rae_xla.train.train_step import TrainStep

T = TypeVar("T")

Metrics = dict[str, float]

MAX_STEPS_AHEAD = 2
"""Steps that are dispatched and not finished: one that the devices compute, and the next one. With
fewer the devices would wait for the host; more would only accumulate batches in device memory,
since nothing else limits the host.
"""


@dataclass(frozen=True)
class DeviceMetrics:
    """The metrics of one step, still on the devices.

    Attributes:
        step: the step that computed them, which defines their names.
        values: (M,) float32.
        flops_per_image: of the step; None if they were not counted.
    """

    step: TrainStep
    values: Tensor
    flops_per_image: float | None = None


@dataclass(frozen=True)
class WindowSummary:
    """The metrics of the steps between two log lines.

    Attributes:
        step: steps taken when the window ended.
        metrics: means over its steps by name; of ``.../skipped``, the sum.
        skipped_in_a_row: the largest number of consecutive skipped steps that ended in it.
    """

    step: int
    metrics: Metrics
    skipped_in_a_row: int


@dataclass
class _DispatchedStep:
    """A step that was dispatched, and how to fetch its metrics."""

    step: TrainStep
    fetch: Callable[[], Tensor]
    metrics: Metrics | None = field(default=None, init=False)

    def read(self) -> Metrics:
        """Return its metrics; waits for the step."""
        if self.metrics is None:
            self.metrics = dict(zip(self.step.metric_names, self.fetch().tolist(), strict=True))
        return self.metrics


class MetricsWindow:
    """Collects the metrics of steps on the devices and reads them when they are available.

    A window is read one step late: by then the next step has been dispatched, so reading does not
    stall the devices. A step that is compiled or captured is excluded from the timing.
    """

    def __init__(self, cadence: Cadence, backend: Backend) -> None:
        self._cadence, self._backend = cadence, backend
        self._accelerator = backend.accelerator()
        self._closed: tuple[int, list[_DispatchedStep], Metrics] | None = None
        self._in_flight: deque[_DispatchedStep] = deque()
        self._timed_steps: set[int] = set()
        self._captures = backend.captures()
        self._skipped_in_a_row = 0
        self._begin()

    def _begin(self) -> None:
        self._steps: list[_DispatchedStep] = []
        self._begin_timing()

    def _begin_timing(self) -> None:
        self._timed, self._flops = 0, 0.0
        self._data_seconds, self._device_seconds, self._paused = 0.0, 0.0, 0.0
        self._since = time.perf_counter()

    def timed_batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield ``batches``, counting the time until each is available as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._data_seconds += time.perf_counter() - start
            yield batch

    @contextmanager
    def _waiting_for_devices(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._device_seconds += time.perf_counter() - start

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time spent in this context from the speed of training."""
        with self._waiting_for_devices():
            self._backend.synchronize()
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def add(self, metrics: DeviceMetrics) -> None:
        """Add the metrics of one step; waits while ``MAX_STEPS_AHEAD`` steps are in flight."""
        dispatched = _DispatchedStep(metrics.step, self._backend.fetch_later(metrics.values))
        self._steps.append(dispatched)
        self._in_flight.append(dispatched)
        self._timed += 1
        self._flops += self._cadence.global_batch * (metrics.flops_per_image or 0.0)
        # The first call of a step compiles it, and a captured one is also traced by the second.
        captures, self._captures = self._captures, self._backend.captures()
        if id(metrics.step) not in self._timed_steps or captures != self._captures:
            self._backend.synchronize()
            self._timed_steps.add(id(metrics.step))
            self._begin_timing()
        if len(self._in_flight) > MAX_STEPS_AHEAD:
            self._read([self._in_flight.popleft()])

    def close(self, step: int, scalars: Metrics) -> None:
        """End the window after ``step`` steps and begin the next one.

        Args:
            step: steps taken.
            scalars: metrics that are known on the host.
        """
        metrics = {**scalars, "train/epoch": step / self._cadence.per_epoch} | self._performance()
        metrics["perf/compilations"] = self._backend.compilations()
        metrics["perf/captures"] = self._backend.captures()
        metrics["perf/fallbacks"] = sum(self._backend.fallbacks().values())
        self._closed = (step, self._steps, metrics)
        self._begin()

    def _performance(self) -> Metrics:
        metrics: Metrics = {"perf/paused": self._paused}
        seconds = time.perf_counter() - self._since - self._paused
        if self._timed:
            rate = self._timed * self._cadence.global_batch / seconds
            devices = self._backend.mesh.size
            host_seconds = seconds - self._data_seconds - self._device_seconds
            metrics |= {
                "perf/step_time": seconds / self._timed,
                "perf/host_time": host_seconds / self._timed,
                "perf/data_wait": self._data_seconds / seconds,
                "perf/images_per_second": rate,
                "perf/images_per_second_per_chip": rate / devices,
            }
            if self._flops and self._accelerator is not None:
                peak = devices * self._accelerator.peak_flops
                metrics["perf/mfu"] = self._flops / seconds / peak
        if (memory := self._backend.memory()) is not None:
            used = memory.used if memory.peak is None else memory.peak
            metrics["perf/memory_gb"] = used / 1e9
        with suppress(OSError):
            metrics["perf/host_memory_gb"] = _resident_bytes() / 1e9
        return metrics

    def take(self) -> WindowSummary | None:
        """Return the window that was closed last, once; None if there is none."""
        if self._closed is None:
            return None
        step, dispatched, metrics = self._closed
        self._closed = None
        steps = self._read(dispatched)
        worst = 0
        for values in steps:
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if _is_skipped(values) else 0
            worst = max(worst, self._skipped_in_a_row)
        return WindowSummary(step, _summarise(steps) | metrics, worst)

    def skipped_now(self) -> int:
        """Return how many steps in a row, up to the last one, were skipped. Waits for them."""
        closed = self._closed[1] if self._closed is not None else []
        count = self._skipped_in_a_row
        for values in self._read([*closed, *self._steps]):
            count = count + 1 if _is_skipped(values) else 0
        return count

    def _read(self, steps: Sequence[_DispatchedStep]) -> list[Metrics]:
        with self._waiting_for_devices():
            return [step.read() for step in steps]


def _resident_bytes() -> int:
    """Return the resident memory of this process; raises ``OSError`` without /proc."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _is_skipped(metrics: Metrics) -> bool:
    return any(value for name, value in metrics.items() if name.endswith(SKIPPED))


def _summarise(steps: Sequence[Metrics]) -> Metrics:
    """Average each metric over the steps that have it and were not skipped; sum the skips."""
    summary: Metrics = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        skipped = name.rpartition("/")[0] + SKIPPED
        values = [step[name] for step in steps if name in step and not step.get(skipped)]
        if name.endswith(SKIPPED):
            summary[name] = sum(step.get(name, 0.0) for step in steps)
        elif finite := [value for value in values if math.isfinite(value)]:
            summary[name] = sum(finite) / len(finite)
    return summary
