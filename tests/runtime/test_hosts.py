"""Words between processes: real ones, on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from rae_xla.errors import UserError
from rae_xla.runtime.hosts import Hosts

pytestmark = pytest.mark.unhurried

PROCESS = """
import json, sys
from datetime import timedelta
from rae_xla.errors import UserError
from rae_xla.runtime.hosts import Hosts

index, count, seconds, *texts = sys.argv[1:]
hosts = Hosts(int(index), int(count), patience=timedelta(seconds=float(seconds)))
try:
    print(json.dumps([hosts.exchange(text) for text in texts]))
except UserError as error:
    print(json.dumps(str(error)))
"""


@pytest.fixture
def start(monkeypatch):
    """Start a process; all of one test meet at the same port."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port - 1)}

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, arguments)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start


def said(process):
    return json.loads(process.communicate(timeout=60)[0])


def test_everybody_hears_everybody_round_after_round(start):
    processes = [start(i, 3, 30, f"a{i}", f"b{i}" * 10_000) for i in (2, 0, 1)]
    expected = [["a0", "a1", "a2"], [f"b{i}" * 10_000 for i in range(3)]]
    assert [said(process) for process in processes] == [expected] * 3


def test_process_0_may_come_last(start):
    others = [start(i, 3, 30, f"a{i}") for i in (1, 2)]
    time.sleep(2)
    processes = [start(0, 3, 30, "a0"), *others]
    assert [said(process) for process in processes] == [[["a0", "a1", "a2"]]] * 3


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_does_not_come_is_told_after_a_while(start, present):
    began = time.monotonic()
    message = said(start(present, 2, 3, "here"))
    missing = "1 other processes" if present == 0 else "process 0"
    assert f"process {present} of 2: no word from {missing} at localhost:" in message
    assert "up to 3 s were given" in message
    assert "\n" not in message
    assert time.monotonic() - began < 40


def test_one_process_needs_no_server():
    hosts = Hosts(0, 1, address="nowhere.invalid", patience=timedelta(seconds=1))
    assert hosts.exchange("alone") == ["alone"]


def test_a_port_that_is_none(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(UserError, match="MASTER_PORT is 'http'"):
        Hosts(0, 1)


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1] - 1))
        with pytest.raises(UserError, match=r"process 0 of 2: no word from.*in use"):
            Hosts(0, 2, patience=timedelta(seconds=2)).exchange("here")
