"""Stop requests by signals and by a metadata server (a small real one)."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from rae_xla.train.callbacks import preemption
from rae_xla.train.callbacks.preemption import (
    AGREE_SECONDS,
    EXIT_STOPPED,
    MAX_AGREE_STEPS,
    RequestExchange,
    StopRequest,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_requests_a_stop_and_handlers_are_restored(number, capfd):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert "finishing the step and saving" in capfd.readouterr().err


TWICE = """
import os, signal, time
from rae_xla.train.callbacks.preemption import StopRequest
with StopRequest() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stop.reason, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


def test_a_second_signal_ends_the_process():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60)
    assert done.stdout == "SIGTERM\n"
    assert done.returncode == 128 + signal.SIGTERM != EXIT_STOPPED


class Metadata(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.removeprefix("/computeMetadata/v1/instance/")
        known = self.headers["Metadata-Flavor"] == "Google" and name in self.server.answers
        self.send_response(200 if known else 403)
        self.end_headers()
        self.wfile.write(self.server.answers.get(name, "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    server.answers = {"preempted": "FALSE", "maintenance-event": "NONE"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(preemption, "POLL_SECONDS", 0.02)
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("entry", "answer", "reason"),
    [
        ("preempted", "TRUE", "is being preempted"),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "go down for maintenance"),
    ],
)
def test_a_notice_requests_a_stop(metadata, entry, answer, reason):
    with StopRequest() as stop:
        time.sleep(0.2)
        assert stop.reason is None
        metadata.answers["maintenance-event"] = (
            "MIGRATE_ON_HOST_MAINTENANCE"  # does not stop the machine
        )
        time.sleep(0.2)
        assert stop.reason is None
        metadata.answers[entry] = answer
        deadline = time.monotonic() + 30
        while stop.reason is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert reason in stop.reason


def test_a_silent_or_unreachable_server_is_no_notice(metadata):
    metadata.answers = {}
    assert preemption.notice(preemption.metadata_host()) is None
    assert preemption.notice("127.0.0.1:9") is None


def exchanges(seconds, first_seconds=0.0, steps=60):
    """Return the steps at which three processes exchange requests, by the clock of process 0."""
    now, found = [0.0], []

    def all_gather_text(text):
        found.append(step)
        own = text.split("\n")[0]
        return [own, text, f"{MAX_AGREE_STEPS}\nstop\nsave"]  # the others' intervals do not count

    backend = SimpleNamespace(process_count=3, all_gather_text=all_gather_text)
    exchange = RequestExchange(backend, clock=lambda: now[0])
    for step in range(steps):
        agreed = exchange.agree(step, set())
        assert agreed == ({"stop", "save"} if found[-1] == step else set())
        now[0] += first_seconds if step == 0 else seconds
    return found


def test_several_processes_agree_at_the_start_and_about_every_two_seconds():
    """A slow step must not use up the 30 seconds that torchrun leaves to a stopped run."""
    fast = exchanges(0.01)
    assert fast[:6] == [0, 1, 3, 7, 15, 25]
    assert {b - a for a, b in itertools.pairwise(fast[4:])} == {MAX_AGREE_STEPS}
    # the first step is no measure: it compiles, or returns at once
    assert exchanges(0.5, first_seconds=90)[:5] == [0, 1, 2, 4, 8]
    assert exchanges(0.5)[-1] - exchanges(0.5)[-2] == AGREE_SECONDS / 0.5
    assert exchanges(3.0)[:6] == [0, 1, 3, 4, 5, 6]


def test_a_single_process_gets_its_own_requests():
    alone = RequestExchange(SimpleNamespace(process_count=1))
    assert alone.agree(7, {"save"}) == {"save"}
