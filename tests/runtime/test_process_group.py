"""Process groups of real processes on this machine, and torchrun's environment variables."""

import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from fake_pod import run_pod

from rae_xla.errors import EXIT_CONNECTION_LOST, UserError
from rae_xla.runtime.process_group import (
    Launch,
    ProcessLostError,
    all_gather_text,
    join_hosts,
    new_gloo_group,
    read_launch,
)

slow = pytest.mark.slow


def pod(*processes, **shared):
    """Run processes 0, 1 … with these texts; return their exit statuses and results."""
    given = [
        {"index": i, "count": len(processes), **shared, **process}
        for i, process in enumerate(processes)
    ]
    return run_pod([process for process in given if "texts" in process])


LOST = ["ProcessLostError", EXIT_CONNECTION_LOST]


@slow
def test_every_process_receives_all_texts_in_order():
    """Process 0 starts last."""
    found = pod(
        *[{"texts": [f"a{i}", f"b{i}" * 10_000], "delay": 1.0 * (i == 0)} for i in range(3)]
    )
    expected = [["a0", "a1", "a2"], [f"b{i}" * 10_000 for i in range(3)]]
    assert found == [(0, expected)] * 3


@slow
@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_does_not_start_is_reported(present):
    began = time.monotonic()
    processes = [{"texts": ["here"]} if i == present else {} for i in range(2)]
    [(_, (kind, status, message))] = pod(*processes, timeout=3)
    assert (kind, status) == ("UserError", 2)
    missing = f"process {1 - present}"
    assert f"process {present} of 2 did not find {missing} at localhost:" in message
    assert "within 3 s" in message
    assert "\n" not in message
    assert time.monotonic() - began < 60


@slow
@pytest.mark.parametrize("ending", ["exit", "kill"])
@pytest.mark.parametrize("which", [0, 2])
def test_a_process_that_ends_later_is_reported_and_the_run_can_be_restarted(which, ending):
    others = {"texts": ["a", "b"]}
    found = pod(*[{"texts": ["a", ending, "c"]} if i == which else others for i in range(3)])
    assert found[which][0] == (0 if ending == "exit" else -signal.SIGKILL)
    for index in {0, 1, 2} - {which}:
        _, (kind, status, message) = found[index]
        assert [kind, status] == LOST
        assert f"process {index} of 3 lost the connection" in message
        assert "\n" not in message


# Process 0, which ends as soon as another has found it.
PROCESS_0 = """
import sys
import torch.distributed as dist

dist.TCPStore("localhost", int(sys.argv[1]) + 1, 2, is_master=True)
"""


@slow
def test_a_process_0_that_ends_before_all_have_joined_can_be_restarted(monkeypatch):
    """A user error would make infra/watch.sh give up."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1] - 1)
    monkeypatch.setenv("MASTER_PORT", port)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    first = subprocess.Popen([sys.executable, "-c", PROCESS_0, port])
    with pytest.raises(ProcessLostError, match="process 1 of 2 lost the connection") as raised:
        join_hosts(1, 2, timeout=timedelta(seconds=60))
    assert first.wait(timeout=60) == 0
    assert raised.value.exit_status == EXIT_CONNECTION_LOST


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
