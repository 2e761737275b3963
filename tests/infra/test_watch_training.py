"""infra/watch.sh brings a real training of two hosts through everything that happens to pods.

The hosts of the fake cloud run the real command line, in two processes that train together with
data and checkpoints in a bucket.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_cloud
import pytest
from gcs_emulator import GcsEmulator
from laptop import ROOT, Laptop
from tiny import make_configs, make_shards

from rae_xla import storage
from rae_xla.checkpoint.manager import list_checkpoints
from rae_xla.errors import EXIT_CONNECTION_LOST

pytestmark = pytest.mark.nightly

STEPS = 90

INSTALL = """
mkdir -p .venv/bin
echo 'PATH=$HOME/rae_xla/.venv/bin:$PATH' >.venv/bin/activate
cat >.venv/bin/rae-xla <<'END'
#!/bin/bash
[[ $1 != doctor ]] || exit 0
set -a
. "$FAKE_CLOUD/environment"
RANK=${FAKE_HOST##*-w-} LOCAL_RANK=${FAKE_HOST##*-w-}
exec PYTHON -m rae_xla "$@"
END
chmod +x .venv/bin/rae-xla
""".replace("PYTHON", sys.executable)


@pytest.fixture
def bucket(monkeypatch):
    with GcsEmulator() as emulator:
        for name in ("shards", "runs"):
            emulator.create_bucket(name)
        for name, value in emulator.environment().items():
            monkeypatch.setenv(name, value)
        yield emulator


@pytest.fixture
def laptop(tmp_path, bucket):
    machine = Laptop(tmp_path, INSTALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = bucket.environment() | {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
        "RAE_XLA_GCS_TIMEOUT": "0.5",
    }  # fmt: skip
    lines = [f"{name}='{value}'\n" for name, value in variables.items()]
    (machine.cloud / "environment").write_text("".join(lines))
    yield machine
    for home in (machine.cloud / "hosts").glob("*"):
        fake_cloud.end_processes(home)


class Watch:
    """A running infra/watch.sh, whose journal a test follows."""

    def __init__(self, laptop: Laptop, *command: str) -> None:
        self.journal = laptop.repo / "results/pods/rae.journal"
        self.process = subprocess.Popen(
            **laptop.command("watch", *command), stdout=subprocess.DEVNULL
        )
        self._read = 0

    def wait_for(self, pattern: str, seconds: float = 600) -> str:
        """Return the next line of the journal that matches."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            lines = self.journal.read_text().splitlines() if self.journal.exists() else []
            for number in range(self._read, len(lines)):
                if re.search(pattern, lines[number]):
                    self._read = number + 1
                    return lines[number]
            assert self.process.poll() is None, lines
            time.sleep(0.05)
        raise TimeoutError(f"{pattern} in {lines}")


def committed_steps() -> list[int]:
    return [checkpoint.step for checkpoint in list_checkpoints("gs://runs/run")]


def committed_steps_without(bucket: GcsEmulator) -> list[int]:
    """End the outage and return what the runs committed before."""
    bucket.clear_faults()
    return committed_steps()


def wait_for_progress(after: int = 0, seconds: float = 600) -> int:
    """Wait for a later checkpoint and return its step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (steps := committed_steps()) and steps[-1] > after:
            return steps[-1]
        time.sleep(0.2)
    raise TimeoutError(f"no checkpoint after step {after}")


def exit_statuses(laptop: Laptop) -> list[int]:
    """All exit statuses in the logs of the hosts."""
    logs = [path.read_text() for path in laptop.cloud.glob("hosts/*/rae_xla.run/log")]
    return [int(status) for log in logs for status in re.findall(r"== exit status (\d+)", log)]


def test_a_run_survives_a_killed_process_0_a_preemption_and_an_outage(laptop, bucket, tmp_path):
    shards = make_shards(tmp_path)
    for path in sorted(Path(shards).iterdir()):
        storage.write_bytes(f"gs://shards/train/{path.name}", path.read_bytes())
    config = make_configs(tmp_path, "gs://shards/train")["stage2"]
    bucket.set_latency(0.02)
    watch = Watch(
        laptop, "--delete", "rae-xla", "train", "stage2", "--config", str(config),
        "--results-dir", "results/run", f"training.steps={STEPS}", "checkpoint.every_steps=3",
        "checkpoint.dir=gs://runs/run", "checkpoint.keep_last=100", "checkpoint.retry_seconds=2",
    )  # fmt: skip
    try:
        watch.wait_for("launched")
        step = wait_for_progress()
        # A killed process 0
        os.kill(int((laptop.home(0) / "rae_xla.run/pid").read_text()), signal.SIGKILL)
        watch.wait_for("the run failed")
        watch.wait_for("launched")
        step = wait_for_progress(step)
        assert 128 + signal.SIGKILL in exit_statuses(laptop)
        # One of the hosts is preempted, and with it the pod
        (laptop.cloud / "events").write_text("preempt\n")
        watch.wait_for("pod: lost")
        watch.wait_for("launched")
        step = wait_for_progress(step)
        # The bucket does not respond, until the run has failed and has been started in vain
        bucket.inject(kind="503")
        watch.wait_for("the run failed")
        watch.wait_for("the run failed")
        assert EXIT_CONNECTION_LOST in exit_statuses(laptop)
        assert 2 not in exit_statuses(laptop)
        assert step <= committed_steps_without(bucket)[-1] < STEPS
        assert watch.wait_for("complete, at step").endswith(f"at step {STEPS}")
        assert watch.process.wait(timeout=60) == 0
    finally:
        watch.process.kill()
        watch.process.wait()
    assert committed_steps()[-1] == STEPS
    manifest = json.loads(storage.read_bytes(f"gs://runs/run/step-{STEPS:08d}/manifest.json"))
    assert manifest["step"] == STEPS
