"""The figures of the steps between two log lines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rae_xla.runtime import Runtime
from rae_xla.train.plan import Plan
from rae_xla.train.step import METRICS

Figures = dict[str, float]


class Window:
    """Gathers the metrics of steps on the devices and reads them one step later.

    The step after the window is on its way to the devices by then, so reading does not stall them.
    The first step of a process, which compiles, is left out of the timing.
    """

    def __init__(self, plan: Plan, runtime: Runtime, schedule: Callable[[int], float]) -> None:
        self._plan, self._runtime, self._schedule = plan, runtime, schedule
        self._metrics: list[Tensor] = []
        self._closed: tuple[int, list[Tensor], Figures] | None = None
        self._compiled = False
        self._begin()

    def _begin(self) -> None:
        self._metrics = []
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

    def add(self, metrics: Tensor) -> None:
        """One step's metrics, still on the devices."""
        self._metrics.append(metrics)
        self._timed += 1
        if not self._compiled:
            self._runtime.synchronize()
            self._compiled = True
            self._timed, self._waited, self._since = 0, 0.0, time.perf_counter()

    def close(self, step: int) -> None:
        """End the window with ``step``, the number of steps taken, and begin the next one."""
        seconds = time.perf_counter() - self._since - self._paused
        figures: Figures = {
            "opt/lr": self._schedule(step - 1),
            "epoch": step / self._plan.per_epoch,
        }
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

    def take(self) -> tuple[int, Figures] | None:
        """The closed window, if there is one: its last step and its figures."""
        if self._closed is None:
            return None
        step, metrics, figures = self._closed
        self._closed = None
        means = torch.stack(self._runtime.fetch(metrics)).double().mean(0).tolist()
        return step, dict(zip(METRICS, means, strict=True)) | figures
