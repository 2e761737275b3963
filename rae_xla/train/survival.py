"""Being told to stop: signals, and notices that a machine is about to be taken away."""

from __future__ import annotations

import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Collection
from pathlib import Path
from types import FrameType

from rae_xla.runtime import Runtime

EXIT_STOPPED = 75
"""Exit status of a run that was told to stop and saved its state: start it again, and it goes on.
EX_TEMPFAIL of sysexits.h, "the user is invited to retry".
"""

AGREE_EVERY = 10
"""Steps between two rounds in which several processes tell each other what they were told."""

POLL_SECONDS = 5.0
"""A preempted machine is given 30 seconds."""

_METADATA = "http://{host}/computeMetadata/v1/instance/{entry}"
_PRODUCT = Path("/sys/class/dmi/id/product_name")


class StopRequest:
    """Whether this process was told to stop; use it with ``with``.

    SIGTERM and Ctrl-C are remembered, for the run to finish its step and save; a second one ends
    the process at once. On machines of Google Cloud a thread asks the metadata server whether they
    are being preempted or taken down for maintenance.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._over = threading.Event()
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
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.reason is not None:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
        # Not by print, which the signal may have interrupted.
        os.write(
            sys.stderr.fileno(),
            f"\n{self.reason}: finishing the step and saving; once more ends it at once\n".encode(),
        )

    def _watch(self, host: str) -> None:
        while self.reason is None and not self._over.is_set():
            if found := notice(host):
                self.reason = found
            self._over.wait(POLL_SECONDS)


def metadata_host() -> str | None:
    """Where the metadata server of Google Cloud is, if this machine has one.

    ``GCE_METADATA_HOST`` names another, as for Google's own libraries.
    """
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    try:
        product = _PRODUCT.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return "metadata.google.internal" if product.startswith("Google") else None


def notice(host: str) -> str | None:
    """Why the machine is about to be taken away; None if it is not, or the server is silent."""
    if _ask(host, "preempted") == "TRUE":
        return "this machine is being preempted"
    if _ask(host, "maintenance-event").startswith("TERMINATE"):
        return "this machine goes down for maintenance"
    return None


def _ask(host: str, entry: str) -> str:
    address = _METADATA.format(host=host, entry=entry)
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=POLL_SECONDS) as answer:
            return str(answer.read(100).decode("ascii", "replace")).strip()
    except OSError:
        return ""


def agreed(runtime: Runtime, step: int, asked: Collection[str]) -> set[str]:
    """What any of the processes asks for, the same in all of them, after a step.

    A process that is alone gets its own answer at every step, several one every ``AGREE_EVERY``:
    it waits for the slowest host, though not for the devices.
    """
    if runtime.process_count == 1:
        return set(asked)
    if step % AGREE_EVERY:
        return set()
    return {
        word for text in runtime.exchange("\n".join(asked)) for word in text.split("\n") if word
    }
