"""Waiting for other processes is logged, with the processes that are missing."""

import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from rae_xla.runtime import waiting
from rae_xla.runtime.waiting import name_processes, wait_for_all, waiting_notice


def test_names():
    assert name_processes([3]) == "process 3"
    assert name_processes([1, 2, 5]) == "processes 1, 2 and 5"
    assert name_processes(range(100)).endswith("6, 7 and 92 more")


def test_a_block_that_waits_is_reported(caplog):
    with waiting_notice(lambda: "waiting for x", first=0.01):
        time.sleep(0.1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "waiting for x (0 s so far)" in caplog.text
    caplog.clear()
    with waiting_notice(lambda: "waiting for x", first=0.2):
        pass
    assert not caplog.records


def test_the_missing_processes_are_named(caplog, monkeypatch):
    monkeypatch.setattr(waiting, "FIRST_NOTICE", 0.1)
    monkeypatch.setattr(waiting, "NEXT_NOTICE", 0.5)
    store = dist.TCPStore("localhost", 0, 3, is_master=True, wait_for_workers=False)

    def join(index, delay):
        time.sleep(delay)
        client = dist.TCPStore("localhost", store.port, 3, wait_for_workers=False)
        assert wait_for_all(client, index, 3, timedelta(seconds=20), "hurry") == []

    thread = threading.Thread(target=join, args=(2, 0.0))
    thread.start()
    assert wait_for_all(store, 0, 3, timedelta(seconds=1), "start it") == [1]
    assert "process 0 of 3 waits for process 1, which" in caplog.text
    assert "at most 1): start it" in caplog.text
    join(1, 0.0)
    thread.join()


# Two processes that join; process 1 begins the exchange late.
LATE = """
import logging, os, sys, time
from rae_xla.runtime import process_group, waiting
waiting.FIRST_NOTICE = 1.0
logging.basicConfig(level="WARNING")
index = int(sys.argv[1])
process_group.join_hosts(index, 2, "localhost")
for _ in range(2):
    assert process_group.all_gather_text(str(index)) == ["0", "1"]
time.sleep(3 * index)
process_group.all_gather_text(str(index))
before = len(os.listdir("/proc/self/task"))
process_group.leave()
assert len(os.listdir("/proc/self/task")) < before  # no thread of gloo is left
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_an_exchange_names_the_late_process():
    environment = {**os.environ, "MASTER_PORT": str(free_port() - 1), "MASTER_ADDR": "localhost"}
    command = [sys.executable, "-c", LATE]
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "process 0 of 2 waits for process 1, which may be" in outputs[0]
    assert "which may be" not in outputs[1]


@pytest.mark.slow
def test_variables_of_torchrun_that_were_left_over_are_reported_soon(tmp_path):
    variables = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, "-m", "rae_xla", "generate", "--smoke", "--num-samples", "1"]
    began = time.monotonic()
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out"), "runtime.backend=torch"],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = next(line for line in process.stderr if "waits for process 1" in line)
        process.terminate()
    assert "unset RANK and WORLD_SIZE" in line
    assert time.monotonic() - began < 60  # most of it is the start of the command
