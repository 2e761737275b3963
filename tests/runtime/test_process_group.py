"""Process groups of real processes on this machine, and torchrun's environment variables."""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest

from rae_xla.errors import UserError
from rae_xla.runtime.process_group import (
    Launch,
    all_gather_text,
    join_hosts,
    new_gloo_group,
    read_launch,
)

slow = pytest.mark.slow

# Joins a group, exchanges each text, and ends in the given way. Prints what it received.
PROCESS = """
import json, sys
from datetime import timedelta
from rae_xla.errors import UserError
from rae_xla.runtime import process_group

index, count, seconds, *texts = sys.argv[1:]
try:
    process_group.join_hosts(int(index), int(count), timeout=timedelta(seconds=float(seconds)))
    received = []
    for text in texts:
        if text == "exit":
            sys.exit()
        received.append(process_group.all_gather_text(text))
    print(json.dumps(received))
except UserError as error:
    print(json.dumps([type(error).__name__, error.exit_status, str(error)]))
"""


@pytest.fixture
def start():
    """Return a function that starts a process; those of one test use the same port."""
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


def output(process):
    """The last line of a process's output; gloo prints lines of its own before it."""
    return json.loads(process.communicate(timeout=60)[0].splitlines()[-1])


@slow
def test_every_process_receives_all_texts_in_order(start):
    processes = [start(i, 3, 30, f"a{i}", f"b{i}" * 10_000) for i in (2, 0, 1)]
    expected = [["a0", "a1", "a2"], [f"b{i}" * 10_000 for i in range(3)]]
    assert [output(process) for process in processes] == [expected] * 3


@slow
def test_process_0_may_start_last(start):
    others = [start(i, 3, 30, f"a{i}") for i in (1, 2)]
    time.sleep(2)
    processes = [start(0, 3, 30, "a0"), *others]
    assert [output(process) for process in processes] == [[["a0", "a1", "a2"]]] * 3


@slow
@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_does_not_start_is_reported(start, present):
    began = time.monotonic()
    kind, status, message = output(start(present, 2, 3, "here"))
    assert (kind, status) == ("UserError", 2)
    missing = "the 1 other processes" if present == 0 else "process 0"
    assert f"process {present} of 2 did not find {missing} at localhost:" in message
    assert "within 3 s" in message
    assert "\n" not in message
    assert time.monotonic() - began < 40


@slow
def test_a_process_that_ends_later_is_reported_and_the_run_can_be_restarted(start):
    first, second = start(0, 2, 10, "a", "b"), start(1, 2, 10, "a", "exit")
    second.wait(timeout=60)
    kind, status, message = output(first)
    assert (kind, status) == ("ProcessLostError", 1)
    assert "process 0 of 2 lost the connection" in message
    assert "\n" not in message


def test_a_single_process_needs_no_group():
    join_hosts(0, 1, address="nowhere.invalid", timeout=timedelta(seconds=1))
    assert all_gather_text("alone") == ["alone"]
    assert new_gloo_group() is None


def test_an_invalid_port_is_reported(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "http")
    with pytest.raises(UserError, match="MASTER_PORT is 'http'"):
        join_hosts(0, 2)


def test_a_port_in_use_is_reported(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1] - 1))
        with pytest.raises(UserError, match=r"process 0 of 2.*in use"):
            join_hosts(0, 2, timeout=timedelta(seconds=2))


def test_without_torchrun_there_is_one_process():
    assert read_launch({}) == read_launch({"WORLD_SIZE": "1", "RANK": "0"}) == Launch()


def test_the_launch_is_read_from_torchruns_variables():
    ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    address = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    assert read_launch(ranks | address) == Launch(index=5, count=8, local_index=1)
    with pytest.raises(UserError, match=r"WORLD_SIZE.*MASTER_ADDR.*torchrun"):
        read_launch(ranks)
    with pytest.raises(UserError, match="RANK is not a number"):
        read_launch(ranks | address | {"RANK": "first"})
