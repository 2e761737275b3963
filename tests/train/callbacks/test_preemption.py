"""Stop requests by signals and by a metadata server (a small real one)."""

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
from rae_xla.train.callbacks.preemption import AGREE_EVERY, EXIT_STOPPED, StopRequest, agree

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


def test_several_processes_agree_at_intervals():
    others = SimpleNamespace(process_count=3, all_gather_text=lambda text: ["", text, "stop\nsave"])
    assert agree(others, AGREE_EVERY + 1, {"stop"}) == set()
    assert agree(others, AGREE_EVERY, set()) == {"stop", "save"}
    alone = SimpleNamespace(process_count=1)
    assert agree(alone, 7, {"save"}) == {"save"}
