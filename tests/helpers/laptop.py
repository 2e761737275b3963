"""A laptop with the scripts of infra/ and a fake cloud (see ``fake_cloud``)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import fake_cloud

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "infra").glob("*.sh"))
SECRET = "s3cret-0123456789"

SETTINGS = f"""
NAME=rae PROJECT=my-project ZONE=us-east5-b ACCELERATOR=v6e-8 BUCKET=my-bucket
WANDB_API_KEY={SECRET}
"""

# The environment of a host: a rae-xla that does on its n-th start what line n of `plays` selects:
# "train" until SIGTERM, "deaf" until it is killed, "exit STATUS"; before its first step, "crash" or
# "lost" (the connection to another host).
INSTALL = r"""
mkdir -p .venv/bin
echo 'PATH=$HOME/rae_xla/.venv/bin:$PATH' >.venv/bin/activate
cat >.venv/bin/rae-xla <<'END'
#!/bin/bash
if [[ $1 == doctor ]]; then
    echo "doctor $*"
    touch "$FAKE_CLOUD/doctor-$(hostname)"
    for ((i = 0; i < 500; i++)); do # the doctor of a host waits for all others
        hosts=($FAKE_CLOUD/doctor-*)
        ((${#hosts[@]} < $(cat $FAKE_CLOUD/doctors 2>/dev/null || echo 0))) || break
        /bin/sleep 0.01
    done
    ((i < 500)) && [[ ! -e $FAKE_CLOUD/ill ]]
    exit
fi
starts=$FAKE_CLOUD/starts-$(hostname)
echo "$* key=${#WANDB_API_KEY} bucket=$BUCKET" >>"$starts"
number=$(wc -l <"$starts")
play=$(sed -n "${number}p" "$FAKE_CLOUD/plays")
echo "play: ${play:=exit 0}"
if [[ $(hostname) == *-w-0 && $play != crash && $play != lost ]]; then
    mkdir -p results/run
    echo "{\"step\": ${number}00, \"train/loss\": 1.0}" >>results/run/metrics.jsonl
fi
case $play in
    train) trap 'echo saved; exit 75' TERM; while :; do /bin/sleep 0.02; done ;;
    deaf) trap '' TERM; while :; do /bin/sleep 0.02; done ;;
    exit*) exit "${play#exit }" ;;
    crash) exit 1 ;;
    lost) exit 77 ;;
esac
END
chmod +x .venv/bin/rae-xla
echo "installed $*"
"""


class Laptop:
    """A clone of a small project with our infra/, and a PATH with the programs of the cloud.

    Args:
        folder: of the clone, the cloud and its programs.
        install: content of the ``install_spmd.sh`` of the project.
    """

    def __init__(self, folder: Path, install: str = INSTALL) -> None:
        self.repo, self.cloud, self.bin = folder / "a clone", folder / "cloud", folder / "bin"
        self.cloud.mkdir()
        fake_cloud.install(self.bin)
        (self.repo / "infra").mkdir(parents=True)
        for path in SCRIPTS:
            shutil.copy(path, self.repo / "infra")
        (self.repo / "install_spmd.sh").write_text(install)
        (self.repo / "setup_gcs_mount.sh").write_text('echo "mounted $*"\n')
        (self.repo / ".gitignore").write_text("results/\ninfra/pod.env\n")
        self.git("init", "--quiet")
        self.commit("first")
        self.settings()

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        command = ["git", "-C", self.repo, *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", message)
        return self.git("rev-parse", "HEAD")

    def settings(self, **more: object) -> None:
        lines = [f"{name}={value}" for name, value in more.items()]
        (self.repo / "infra/pod.env").write_text("\n".join([SETTINGS, *lines, ""]))

    def plays(self, *lines: str) -> None:
        (self.cloud / "plays").write_text("\n".join([*lines, ""]))

    def command(self, verb: str, *words: str) -> dict:
        return {
            "args": ["bash", self.repo / f"infra/{verb}.sh", *words],
            "cwd": self.cloud.parent,
            "env": {
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "HOME": str(self.cloud.parent),
                "FAKE_CLOUD": str(self.cloud),
            },
            "text": True,
        }

    def run(self, verb: str, *words: str, answer: str = "") -> subprocess.CompletedProcess[str]:
        """Run a script of infra/; `.calls` are the calls of programs that it made."""
        before = len(self.all_calls())
        done = subprocess.run(
            **self.command(verb, *words), input=answer, capture_output=True, timeout=60
        )
        self.calls = self.all_calls()[before:]
        return done

    def do(self, verb: str, *words: str) -> str:
        """Run a script that must succeed and return its output."""
        done = self.run(verb, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def all_calls(self) -> list[list[str]]:
        return fake_cloud.calls(self.cloud)

    def gcloud(self) -> list[list[str]]:
        """Return the gcloud commands of the last script, without queries of the state."""
        tpus = [call[3:] for call in self.calls if call[:3] == ["gcloud", "compute", "tpus"]]
        return [words for words in tpus if words[1] != "describe"]

    def home(self, worker: int, node: str = "rae") -> Path:
        return self.cloud / f"hosts/{node}-w-{worker}"

    def states(self) -> list[str]:
        """Return run and status of each host, as infra/status.sh shows them."""
        lines = self.do("status").splitlines()
        return [" ".join(line.split()[1:3]) for line in lines if re.match(r"rae[-\d]*/", line)]

    def wait_for(self, *states: str) -> None:
        until = time.monotonic() + 20
        while self.states() != list(states):
            assert time.monotonic() < until, self.states()

    def up(self) -> None:
        self.do("create")
        self.do("setup")
