"""The watchdog ends runs that hang, with a report: in processes that really hang."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment, make_configs, make_shards

from rae_xla.train.callbacks.watchdog import EXIT_HUNG, LONG

pytestmark = pytest.mark.slow

TIMEOUT = 1.0

START = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from rae_xla.train.callbacks.watchdog import DATA, FIRST_STEP, STEP, Watchdog
folder = Path(sys.argv[1])
"""


def run(folder: Path, code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START + code, str(folder)],
        capture_output=True, text=True, timeout=60, env=environment(), check=False,
    )  # fmt: skip


def test_a_hang_is_ended_and_reported_with_all_stacks(tmp_path):
    done = run(tmp_path, f"""
def waits_on_an_event():
    threading.Event().wait()

def reads_a_bucket():
    time.sleep(1000)

threading.Thread(target=waits_on_an_event, daemon=True).start()
with Watchdog({TIMEOUT}, folder, process_index=3) as watchdog:
    watchdog.begin(DATA, 12)
    reads_a_bucket()
""")  # fmt: skip
    assert done.returncode == EXIT_HUNG, done.stderr
    report = (tmp_path / "hang-3.txt").read_text()
    for text in (report, done.stderr):
        assert "process 3" in text
        assert "after step 12 the process was waiting for data, since 20" in text
        assert f"training.hang_timeout={TIMEOUT:g})" in text
        assert "Look at: the storage of data.train" in text
        assert "in reads_a_bucket" in text
        assert "in waits_on_an_event" in text


def test_hanging_native_code_and_a_missing_folder(tmp_path):
    gone = tmp_path / "gone"
    done = run(gone, f"""
with Watchdog({TIMEOUT}, folder) as watchdog:
    watchdog.begin(STEP, 1)
    ctypes.CDLL(None).sleep(1000)
""")  # fmt: skip
    assert done.returncode == EXIT_HUNG, done.stderr
    assert "waiting for the devices" in done.stderr
    assert not gone.exists()


def test_progress_and_long_activities_are_not_ended(tmp_path):
    timeout = 0.6
    assert LONG > 4
    done = run(tmp_path, f"""
with Watchdog({timeout}, folder) as watchdog:
    for step in range(8):
        watchdog.begin(STEP, step)
        time.sleep({timeout} / 4)
    watchdog.begin(FIRST_STEP, 8)
    time.sleep(2 * {timeout})
    watchdog.begin(STEP, 9, extra_seconds=8 * {timeout})
    time.sleep(2 * {timeout})
time.sleep(2 * {timeout})  # the watchdog is closed
with Watchdog(0, folder):  # the watchdog is disabled
    time.sleep(2 * {timeout})
print("alive")
""")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_suspended_time_does_not_count(tmp_path):
    timeout = 2.0
    process = subprocess.Popen(
        [sys.executable, "-c", START + f"""
with Watchdog({timeout}, folder) as watchdog:
    watchdog.begin(STEP, 1)
    print("begun", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep({timeout} / 8)
print("alive")
""", str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "begun\n"
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5 * timeout)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "alive\n"
        assert process.wait() == 0
    finally:
        process.kill()
        process.wait()


# A training whose data source, or whose step, hangs after some steps.
HANGS = {
    "data": """
import rae_xla.train.trainer as trainer
batches = trainer.host_batches
def host_batches(*args):
    for number, batch in enumerate(batches(*args)):
        if number == 3:
            time.sleep(1000)
        yield batch
trainer.host_batches = host_batches
""",
    "step": """
from rae_xla.runtime.torch.backend import TorchBackend
compile = TorchBackend.compile
def compile_(self, fn):
    calls = []
    def step(*args):
        calls.append(1)
        if len(calls) == 4:
            time.sleep(1000)
        return fn(*args)
    return step
TorchBackend.compile = compile_
""",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return make_configs(folder, make_shards(folder))["stage2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "activity"), [("data", "waiting for data"), ("step", "running a step")]
)
def test_a_training_that_hangs_ends_and_can_be_resumed(tmp_path, config, what, activity):
    arguments = ["train", "stage2", "--config", str(config), "--results-dir", str(tmp_path),
                 "training.hang_timeout=3", "training.steps=5"]  # fmt: skip
    hung = run(tmp_path, f"{HANGS[what]}\nfrom rae_xla.cli.main import main\nmain({arguments})")
    assert hung.returncode == EXIT_HUNG, hung.stderr
    assert f"after step 3 the process was {activity}" in (tmp_path / "hang-0.txt").read_text()
    again = subprocess.run(
        [sys.executable, "-m", "rae_xla", *arguments, "training.hang_timeout=100"],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
