"""Preemption: stop and save on a signal, or when the cloud is about to stop the machine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Collection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rae_xla.runtime import Backend
from rae_xla.train.callbacks.base import Callback
from rae_xla.train.callbacks.watchdog import HOSTS
from rae_xla.train.metrics_window import DeviceMetrics

if TYPE_CHECKING:
    from rae_xla.train.trainer import Trainer

EXIT_STOPPED = 75
"""Exit status of a run that was stopped and saved its state: started again, it resumes.

EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
"""

AGREE_SECONDS = 2.0
"""About the time between two exchanges of requests between processes.

A stop waits for the next exchange, and then for the checkpoint: torchrun kills its processes 30
seconds after it has asked them to stop, and a preempted machine goes down as soon.
"""

MAX_AGREE_STEPS = 10
"""Most steps between two exchanges of requests between processes."""

POLL_SECONDS = 5.0
"""Seconds between two queries of the metadata server; a preempted machine has 30."""

STOP, SAVE = "stop", "save"
"""Requests that all processes of a run agree on."""

_METADATA = "http://{host}/computeMetadata/v1/instance/{entry}"
_PRODUCT = Path("/sys/class/dmi/id/product_name")


class StopRequest:
    """A request to stop this process, from a signal or from the cloud; a context manager.

    After SIGTERM or Ctrl-C the run finishes its step and saves; a second signal ends the process
    immediately. On Google Cloud a thread polls the metadata server for preemption and maintenance.

    Attributes:
        reason: why the process is to stop; None if it is not.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._closed = threading.Event()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        if host := metadata_host():
            watch = threading.Thread(target=self._watch, args=(host,), name="preemption")
            watch.daemon = True
            watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
        # os.write is reentrant; print is not, and the signal may have interrupted one.
        os.write(
            sys.stderr.fileno(),
            f"\n{self.reason}: finishing the step and saving; repeat it to exit at once\n".encode(),
        )

    def _watch(self, host: str) -> None:
        while self.reason is None and not self._closed.is_set():
            if found := notice(host):
                self.reason = found
            self._closed.wait(POLL_SECONDS)


def metadata_host() -> str | None:
    """Return the host of Google Cloud's metadata server; None on other machines.

    ``GCE_METADATA_HOST`` overrides it, as in Google's own libraries.
    """
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    try:
        product = _PRODUCT.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return "metadata.google.internal" if product.startswith("Google") else None


def notice(host: str) -> str | None:
    """Return why the machine is about to stop; None if it is not or the server does not respond."""
    if _query(host, "preempted") == "TRUE":
        return "this machine is being preempted"
    if _query(host, "maintenance-event").startswith("TERMINATE"):
        return "this machine is about to go down for maintenance"
    return None


def _query(host: str, entry: str) -> str:
    address = _METADATA.format(host=host, entry=entry)
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=POLL_SECONDS) as response:
            return str(response.read(100).decode("ascii", "replace")).strip()
    except OSError:
        return ""


class RequestExchange:
    """Exchanges the requests of the processes of a run, about every ``AGREE_SECONDS``.

    An exchange waits for the slowest host, but not for the devices. Process 0 chooses the step of
    the next one by its clock, so that all processes take part at the same step.

    Args:
        backend: whose processes all use one.
        clock: returns seconds.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float] = time.monotonic) -> None:
        self._backend, self._clock = backend, clock
        self._next: int | None = None
        self._last: tuple[int, float] | None = None
        self._steps = 1

    def agree(self, step: int, requests: Collection[str]) -> set[str]:
        """Return the requests of all processes, the same set on each of them.

        A single process gets its own requests at every step.

        Args:
            step: steps taken; all processes call this at the same steps.
            requests: of this process.
        """
        if self._backend.process_count == 1:
            return set(requests)
        if self._next is not None and step < self._next:
            return set()
        texts = self._backend.all_gather_text("\n".join([str(self._interval(step)), *requests]))
        lines = [text.split("\n") for text in texts]
        self._next = step + int(lines[0][0])
        return {request for of_process in lines for request in of_process[1:]}

    def _interval(self, step: int) -> int:
        """Return after how many steps the next exchange is due, by the time of the last steps.

        It doubles at most, because the first steps say little: one compiles, and the next ones
        return before the devices have computed them.
        """
        now, before = self._clock(), self._last
        self._last = step, now
        if before is not None and step > before[0]:
            seconds = (now - before[1]) / (step - before[0])
            most = min(2 * self._steps, MAX_AGREE_STEPS)
            self._steps = max(1, min(most, int(AGREE_SECONDS / max(seconds, 1e-9))))
        return self._steps


class PreemptionCallback(Callback):
    """Stops the run on all processes when one of them is to stop; exchanges other requests, too.

    It is the last callback of a step, so whatever is due at a step is done before the run stops.
    """

    def __init__(self, stop_request: StopRequest, backend: Backend) -> None:
        self._stop_request = stop_request
        self._exchange = RequestExchange(backend)

    def on_train_start(self, trainer: Trainer) -> None:
        """Stop before the first step, which may take minutes to compile."""
        self._agree(trainer)

    def on_step_end(self, trainer: Trainer, metrics: DeviceMetrics) -> None:
        """Exchange the requests of the processes."""
        self._agree(trainer)

    def _agree(self, trainer: Trainer) -> None:
        step = trainer.state.step
        trainer.run.watchdog.begin(HOSTS, step)
        if self._stop_request.reason is not None:
            trainer.requests.add(STOP)
        trainer.agreed = self._exchange.agree(step, trainer.requests)
        if trainer.agreed:  # else the requests of this process have not been exchanged yet
            trainer.requests.clear()
        if STOP in trainer.agreed:
            trainer.stop(self._stop_request.reason or "requested by another process")
