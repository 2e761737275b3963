"""Tests of the scripts in infra/ against a fake cloud whose hosts really run (fake_cloud)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import fake_cloud
import pytest
from document_commands import check, shell_blocks
from laptop import ROOT, SCRIPTS, SECRET, SETTINGS, Laptop

pytestmark = pytest.mark.slow

VERBS = [path.stem for path in SCRIPTS if path.stem not in {"lib_pod", "host", "free_tpu"}]
HERE = ["--zone=us-east5-b", "--project=my-project", "--quiet"]


@pytest.fixture
def laptop(tmp_path):
    machine = Laptop(tmp_path)
    yield machine
    for home in (machine.cloud / "hosts").glob("*"):
        fake_cloud.end_processes(home)


def readable_by_others(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o077)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    return next(line for line in done.stderr.splitlines() if line.startswith("pod: error: "))


# ----------------------------------------------------------------------------- create


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["tpu-vm", "create", "rae", "--version=v2-alpha-tpuv6e"]),
        ({"CAPACITY": "spot"}, ["tpu-vm", "create", "rae", "--version=v2-alpha-tpuv6e", "--spot"]),
        (
            {"KIND": "queued", "CAPACITY": "reserved", "CREATE_OPTIONS": '("--labels=a=b c")'},
            ["queued-resources", "create", "rae", "--node-id=rae",
             "--runtime-version=v2-alpha-tpuv6e", "--reserved", "--labels=a=b c"],
        ),
        (
            {"KIND": "queued", "SLICES": 2, "CAPACITY": "spot"},
            ["queued-resources", "create", "rae", "--node-count=2", "--node-prefix=rae",
             "--runtime-version=v2-alpha-tpuv6e", "--spot"],
        ),
    ],
    ids=["vm", "spot", "queued", "slices"],
)  # fmt: skip
def test_create(laptop, settings, words):
    laptop.settings(**settings)
    output = laptop.do("create")
    [call] = laptop.gcloud()
    assert sorted(call) == sorted([*words, "--accelerator-type=v6e-8", *HERE])
    assert output.splitlines()[-1].startswith("pod: rae: ready ")
    if settings.get("KIND") == "queued":
        assert "pod: rae: waiting WAITING_FOR_RESOURCES" in output
    again = laptop.do("create")
    assert "rae exists already: ready" in again
    assert laptop.gcloud() == []


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"),
     ("v5p-32", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)  # fmt: skip
def test_software_versions(laptop, accelerator, version):
    laptop.settings(ACCELERATOR=accelerator)
    assert f"--version={version} " in laptop.do("create", "--dry-run")


def test_unknown_accelerator_needs_a_software_version(laptop):
    laptop.settings(ACCELERATOR="v9x-8")
    assert "RUNTIME_VERSION" in error_of(laptop.run("create"))
    laptop.settings(ACCELERATOR="v9x-8", RUNTIME_VERSION="v3-alpha")
    assert "--version=v3-alpha " in laptop.do("create", "--dry-run")


def test_missing_capacity_is_an_error(laptop):
    (laptop.cloud / "refusals").write_text("RESOURCE_EXHAUSTED: no more capacity in the zone\n")
    done = laptop.run("create")
    assert "gcloud refused" in error_of(done)
    assert "no more capacity in the zone" in done.stderr


# ----------------------------------------------------------------------------- settings


REFUSED = {
    "NAME": ["'my pod'", "'a;rm -rf ~'", "'$(id)'", "Pod", "''"],
    "PROJECT": ["'a b'"],
    "ZONE": ["'us-east5-b;id'"],
    "BUCKET": ["gs://my-bucket", "'a;b'"],
    "KIND": ["gpu"],
    "CAPACITY": ["cheap"],
    "SLICES": ["many"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_settings_are_refused(laptop, name):
    for value in REFUSED[name]:
        laptop.settings(**{name: value})
        shown = value.strip("'")
        error = error_of(laptop.run("delete", "--yes"))
        assert f"{name}='{shown}' is invalid: it must be " in error
    assert laptop.all_calls() == []


def test_inconsistent_settings_are_refused(laptop):
    laptop.settings(ACCELERATOR="'v6e-8 --spot'")
    assert "ACCELERATOR" in error_of(laptop.run("create"))
    laptop.settings(SLICES=2)
    assert "SLICES=2 needs KIND=queued" in error_of(laptop.run("create"))
    laptop.settings(MOUNT_POINT="'/mnt/a b'")
    assert "MOUNT_POINT" in error_of(laptop.run("setup"))
    laptop.settings(PASS_ENV="'A;id'")
    assert "PASS_ENV" in error_of(laptop.run("launch", "true"))
    (laptop.repo / "infra/pod.env").unlink()
    assert "copy infra/pod.env.example" in error_of(laptop.run("status"))
    assert laptop.all_calls() == []


def test_settings_of_another_pod(laptop):
    other = laptop.repo / "infra/my other.env"
    other.write_text(SETTINGS.replace("rae", "other"))
    laptop.do("create", f"--env={other}")
    assert laptop.gcloud()[0][2] == "other"


def test_example_settings_are_valid(laptop):
    (laptop.repo / "infra/pod.env").write_text((ROOT / "infra/pod.env.example").read_text())
    assert "gcloud compute tpus tpu-vm create rae " in laptop.do("create", "--dry-run")


@pytest.mark.parametrize("verb", VERBS)
def test_help_and_unknown_options(laptop, verb):
    done = laptop.run(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: bash infra/{verb}.sh [")
    done = laptop.run(verb, "--no-such-option")
    assert "unknown option: --no-such-option" in error_of(done)
    assert laptop.calls == []


DRY = {"launch": ["echo", "a b"], "watch": ["echo", "a b"]}


@pytest.mark.parametrize("verb", VERBS)
def test_dry_run_only_prints(laptop, verb):
    laptop.settings(MOUNT_POINT="/mnt/bucket")
    output = laptop.do(verb, "--dry-run", *DRY.get(verb, []))
    assert laptop.calls == []
    lines = [shlex.split(line) for line in output.splitlines()]
    assert lines
    assert all(line[:3] == ["gcloud", "compute", "tpus"] for line in lines)
    assert all(set(HERE) <= set(line) for line in lines)
    assert SECRET not in output
    assert not (laptop.repo / "results").exists()


def test_documented_commands(laptop, monkeypatch):
    """Every script call in docs/tpu.md is valid, and so is the command that it passes on."""
    monkeypatch.chdir(ROOT)
    text = shell_blocks((ROOT / "docs/tpu.md").read_text())
    lines = [shlex.split(line) for line in text.splitlines() if line.startswith("bash infra/")]
    assert {Path(line[1]).stem for line in lines} == set(VERBS)
    for _, script, *words in lines:
        output = laptop.do(Path(script).stem, "--dry-run", *words)
        assert output.startswith("gcloud compute tpus ")
        if "--" in words and "setup" not in script:
            check(words[words.index("--") + 1 :])
    assert laptop.calls == []


def test_scripts_are_short():
    assert {path.name: n for path in SCRIPTS if (n := path.read_text().count("\n")) >= 100} == {}


# ----------------------------------------------------------------------------- setup


def test_setup(laptop):
    laptop.settings(MOUNT_POINT="/mnt/bucket")
    laptop.do("create")
    output = laptop.do("setup", "--", "--config", "my run.yaml")
    commit = laptop.git("rev-parse", "HEAD")
    ssh = [call for call in laptop.gcloud() if call[1] == "ssh"]
    unpack = (
        "--command=umask 077 && cat >rae_xla.tar.gz && gzip -t rae_xla.tar.gz && "
        "tar -xzOf rae_xla.tar.gz infra/host.sh | "
        f"bash -s rae unpack ~/rae_xla.tar.gz {commit}"
    )
    host = "--command=bash rae_xla/infra/host.sh rae "
    assert ssh[0] == ["tpu-vm", "ssh", "rae", "--worker=0", "--command=true", *HERE]
    assert sorted(ssh[1:3]) == [
        ["tpu-vm", "ssh", "rae", f"--worker={i}", unpack, *HERE] for i in range(2)
    ]
    assert ssh[3:] == [
        ["tpu-vm", "ssh", "rae", "--worker=all", command, "--batch-size=all", *HERE]
        for command in (
            f"{host}install my-bucket /mnt/bucket ",
            f"{host}doctor --config my\\ run.yaml ",
        )
    ]
    assert laptop.calls.count(["gcloud", "storage", "ls", "gs://my-bucket"]) == 2
    for worker in range(2):
        for line in ("installed --accelerator tpu", "mounted gs://my-bucket /mnt/bucket",
                     "doctor doctor --config my run.yaml"):  # fmt: skip
            assert f"rae/{worker}: {line}\n" in output
        assert (laptop.home(worker) / "rae_xla/.commit").read_text().strip() == commit
        assert not readable_by_others(laptop.home(worker) / "rae_xla.tar.gz")


def test_second_setup_replaces_the_code(laptop):
    (laptop.repo / "old file.py").touch()
    laptop.commit("old")
    laptop.up()
    code = laptop.home(0) / "rae_xla"
    (code / "results/mine").mkdir(parents=True)
    assert (code / "old file.py").exists()
    assert "code is up to date" in laptop.do("setup")
    (laptop.repo / "old file.py").unlink()
    (laptop.repo / "new.py").touch()
    first = laptop.git("rev-parse", "HEAD")
    laptop.commit("new")
    (laptop.repo / "not committed.py").touch()
    assert "note: uncommitted changes" in laptop.do("setup", "--no-doctor")
    assert [path.name for path in sorted(code.glob("*.py"))] == ["new.py"]
    assert (code / "results/mine").is_dir()
    laptop.do("setup", f"--commit={first}")
    assert [path.name for path in sorted(code.glob("*.py"))] == ["old file.py"]
    assert "commit v9 does not exist" in error_of(laptop.run("setup", "--commit=v9"))


def test_failed_setup(laptop):
    assert "rae is not ready: 'none none'" in error_of(laptop.run("setup"))
    laptop.do("create")
    (laptop.cloud / "no-bucket").touch()
    done = laptop.run("setup")
    assert "not every host was set up" in error_of(done)
    assert "rae/1: error: gs://my-bucket cannot be listed from here" in done.stderr
    (laptop.cloud / "no-bucket").unlink()
    (laptop.cloud / "ill").touch()
    assert "the doctor found problems" in error_of(laptop.run("setup"))


# ----------------------------------------------------------------------------- one run


def test_launch_status_logs_stop_and_delete(laptop):
    """The secret appears on no command line and in no log."""
    laptop.plays("train", "train")
    laptop.up()
    assert laptop.states() == ["idle -"] * 2
    run = ["rae-xla", "train", "stage2", "data.train=my shards;touch oops", "x=$(id)"]
    laptop.do("launch", *run)
    start = "--command=bash rae_xla/infra/host.sh rae start"
    assert sorted(laptop.gcloud()) == [
        ["tpu-vm", "ssh", "rae", f"--worker={i}", start, *HERE] for i in range(2)
    ]
    tmux = [call for call in laptop.calls if call[:2] == ["tmux", "new-session"]]
    assert tmux == [["tmux", "new-session", "-d", "-s", "rae_xla",
                     "bash infra/host.sh rae run"]] * 2  # fmt: skip
    laptop.wait_for("running -", "running -")
    starts = [path.read_text() for path in laptop.cloud.glob("starts-*")]
    assert starts == [f"{' '.join(run[1:])} key={len(SECRET)} bucket=my-bucket\n"] * 2
    status = laptop.do("status")
    assert re.search(r"^rae/0 +running +- +100 +\d+ s ago$", status, re.M), status

    # a second launch changes nothing; a different run is refused
    laptop.do("launch", *run)
    assert "another run is active" in laptop.run("launch", "rae-xla", "other").stderr
    laptop.git("commit", "--allow-empty", "--quiet", "--message", "other")
    assert "with other code" in laptop.run("setup").stderr
    assert [path.read_text().count("\n") for path in laptop.cloud.glob("starts-*")] == [1, 1]

    assert "rae/0: play: train" in laptop.do("logs", "--no-follow")
    assert "rae/1" not in laptop.do("logs", "--no-follow")
    assert "rae/1: play: train" in laptop.do("logs", "--all", "--lines=5", "--no-follow")
    assert laptop.gcloud()[0][4] == "--command=bash rae_xla/infra/host.sh rae log 5 '' "

    stopped = laptop.do("stop")
    first, second = sorted(stopped.splitlines()[1:])
    assert re.fullmatch(r"rae/0: stopped 75 100 \d+", first)
    assert second == "rae/1: stopped 75 - -"
    assert "stopped" in laptop.do("stop"), "a second stop changes nothing"
    laptop.do("launch", *run)
    laptop.wait_for("running -", "running -")
    laptop.do("stop", "--wait=5")

    done = laptop.run("delete", answer="no\n")
    assert "not deleted" in error_of(done)
    done = laptop.run("delete", answer="rae\n")
    assert laptop.gcloud() == [["tpu-vm", "delete", "rae", *HERE]]
    assert "rae does not exist" in laptop.do("delete", "--yes")

    assert SECRET not in (laptop.cloud / "calls").read_text()
    assert not any("oops" in path.name for path in laptop.cloud.rglob("*"))


def test_secret_is_stored_in_one_private_file(laptop):
    laptop.plays("train")
    laptop.up()
    laptop.do("launch", "rae-xla", "train")
    files = [path for path in laptop.home(0).rglob("*") if path.is_file()]
    [holder] = [path for path in files if SECRET in path.read_text(errors="replace")]
    assert holder.name == "command"
    assert not readable_by_others(holder)
    assert not readable_by_others(holder.parent)


def test_run_that_ignores_sigterm_is_killed(laptop):
    laptop.plays("deaf")
    laptop.up()
    laptop.do("launch", "bash", "-c", "rae-xla train; exit $?")
    laptop.wait_for("running -", "running -")
    output = laptop.do("stop", "--wait=2")
    assert "rae/1: still running after 2 s: killed" in output
    assert "rae/1: stopped 137 - -" in output


def test_sigterm_goes_to_the_program_that_a_script_runs(laptop):
    """SIGTERM would end the script itself and leave the training running."""
    laptop.plays("train")
    laptop.up()
    laptop.do("launch", "bash", "-c", "rae-xla train; exit $?")
    laptop.wait_for("running -", "running -")
    assert "rae/0: stopped 75 100 " in laptop.do("stop")
    assert "saved" in laptop.do("logs", "--no-follow")


def test_launch_on_hosts_without_setup(laptop):
    laptop.do("create")
    assert "not started on every host" in error_of(laptop.run("launch", "true"))


def test_restarted_machine(laptop):
    laptop.plays("train", "train")
    laptop.up()
    laptop.do("launch", "rae-xla")
    laptop.wait_for("running -", "running -")
    fake_cloud.end_processes(laptop.home(1))
    laptop.wait_for("running -", "died -")
    laptop.do("launch", "rae-xla")
    laptop.wait_for("running -", "running -")
    starts = [(laptop.cloud / f"starts-rae-w-{i}").read_text().count("\n") for i in range(2)]
    assert starts == [1, 2]


@pytest.mark.slow
def test_multiple_slices(laptop):
    laptop.settings(KIND="queued", SLICES=2, CAPACITY="spot")
    laptop.plays("train")
    laptop.up()
    laptop.do("launch", "rae-xla", "train")
    assert sorted(call[2:4] for call in laptop.gcloud()) == [
        [f"rae-{i}", f"--worker={j}"] for i in range(2) for j in range(2)
    ]
    laptop.wait_for(*["running -"] * 4)
    assert "rae-1/0 " in laptop.do("status")
    laptop.do("stop")
    laptop.do("delete", "--yes")
    assert laptop.gcloud() == [["queued-resources", "delete", "rae", "--force", *HERE]]
    assert "pod: rae (2 x v6e-8, spot, us-east5-b): none" in laptop.do("status")


def test_unreachable_cloud_is_not_an_empty_one(laptop):
    laptop.up()
    (laptop.cloud / "silent").touch()
    assert "does not answer" in error_of(laptop.run("create"))
    assert "nothing was deleted" in error_of(laptop.run("delete", "--yes"))
    assert "unknown" in laptop.do("status")


def test_the_doctor_runs_on_all_hosts_of_a_large_pod_at_once(laptop):
    """By default gcloud would start the next hosts after the first ones have ended."""
    (laptop.cloud / "batch-size").write_text("1\n")
    (laptop.cloud / "doctors").write_text("2\n")
    laptop.do("create")
    laptop.do("setup")
    assert len(list(laptop.cloud.glob("doctor-rae-w-*"))) == 2


HOLD = """
import signal, sys
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
chip = open(sys.argv[1])
print("held", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("kind", ["stale", "deaf"])
def test_force_ends_what_holds_a_tpu(laptop, tmp_path, kind):
    """The script itself, with a folder in place of /dev, and real processes."""
    chip, lock = tmp_path / "dev/vfio/0", tmp_path / "lock"
    chip.parent.mkdir(parents=True)
    chip.touch()
    lock.touch()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, chip, kind], stdout=subprocess.PIPE, text=True
    )
    threading.Thread(target=holder.wait, daemon=True).start()  # a zombie would keep its name
    try:
        assert holder.stdout.readline() == "held\n"
        command = ["bash", ROOT / "infra/free_tpu.sh", tmp_path / "dev", lock]
        done = subprocess.run(
            command, env={"PATH": f"{laptop.bin}:{os.environ['PATH']}",
                          "FAKE_CLOUD": str(laptop.cloud)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert f"ending process {holder.pid}, which holds a TPU" in done.stdout
        assert done.stdout.endswith("the TPU is free\n")
        assert holder.wait(timeout=10) == (-9 if kind == "deaf" else -15)
        assert not lock.exists()
    finally:
        holder.kill()


def test_stop_with_force_frees_every_host(laptop):
    (laptop.repo / "infra/free_tpu.sh").write_text("echo the TPU is free\n")  # not of this machine
    laptop.commit("harmless")
    laptop.up()
    output = laptop.do("stop", "--force")
    commands = [word for call in laptop.gcloud() for word in call if word.startswith("--command")]
    assert [command.split()[-1] for command in commands] == ["600", "free"]
    assert output.count("the TPU is free") == 2


# ----------------------------------------------------------------------------- watch


def journal(laptop) -> list[str]:
    path = laptop.repo / "results/pods/rae.journal"
    return [line.partition(" ")[2] for line in path.read_text().splitlines()]


RUN = ["rae-xla", "train", "checkpoint.dir=gs://my-bucket/my run"]


@pytest.mark.parametrize("kind", ["vm", pytest.param("queued", marks=pytest.mark.slow)])
def test_watch_through_a_preemption(laptop, kind):
    """The pod is created, preempted, created again, relaunched, completed and deleted."""
    laptop.settings(CAPACITY="spot", KIND=kind)
    laptop.plays("train", "exit 0")
    looks = 7 if kind == "vm" else 12
    (laptop.cloud / "events").write_text("look\n" * looks + "preempt\n")
    (laptop.cloud / "refusals").write_text("RESOURCE_EXHAUSTED\n")
    laptop.do("watch", "--delete", *RUN)
    did = [call[1] for call in laptop.gcloud() if call[1] != "ssh"]
    assert did == ["create", "create", "delete", "create", "delete"]
    lines = journal(laptop)
    assert lines[0] == f"watching rae, code {laptop.git('rev-parse', 'HEAD')[:12]}"
    assert "creation failed: retrying in 30 s" in lines
    assert sum(line.startswith("launched: rae-xla train ") for line in lines) == 2
    assert any(line.startswith("pod: lost ") for line in lines)
    assert lines[-1] == "complete, at step 200"
    for worker in range(2):
        starts = (laptop.cloud / f"starts-rae-w-{worker}").read_text().splitlines()
        assert starts == [f"{' '.join(RUN[1:])} key={len(SECRET)} bucket=my-bucket"] * 2
    assert SECRET not in (laptop.cloud / "calls").read_text() + "".join(lines)
    assert ["sleep", "60"] in laptop.calls


@pytest.mark.slow
def test_watch_restarts_after_75_and_76_with_the_same_commit(laptop):
    laptop.plays("exit 75", "exit 76", "exit 1", "exit 0")
    laptop.do("watch", *RUN)
    lines = journal(laptop)
    assert [line for line in lines if "retrying in" in line] == [
        "the run failed (1): retrying in 30 s",
        "the run failed (1): retrying in 60 s",
    ]  # a step in between resets the delay
    assert lines[-1] == "complete, at step 400"
    assert laptop.states() == ["ended 0"] * 2, "the pod stays"
    assert laptop.do("watch", *RUN).splitlines()[-1].endswith("complete, at step 400")


def test_watch_does_not_restart_after_a_user_error(laptop):
    laptop.plays("exit 2")
    done = laptop.run("watch", *RUN)
    assert done.returncode == 2
    assert "an error that a restart cannot fix" in journal(laptop)[-1]
    assert (laptop.cloud / "starts-rae-w-0").read_text().count("\n") == 1


@pytest.mark.slow
def test_watch_restarts_after_lost_connections(laptop):
    """Six without a step: more than it allows for other failures."""
    (laptop.cloud / "starts-rae-w-1").write_text("\n" * 7)  # this host starts with line 8
    laptop.plays(*["lost"] * 6, "exit 0", *["lost"] * 6, "exit 0")
    laptop.do("watch", *RUN)
    lines = journal(laptop)
    pauses = (30, 60, 120, 240, 480, 900)
    assert [line for line in lines if "retrying in" in line] == [
        f"the run failed ({n}): retrying in {pause} s" for n, pause in enumerate(pauses, 1)
    ]
    assert lines[-1] == "complete, at step 700"


@pytest.mark.nightly
def test_watch_gives_up_during_a_long_outage(laptop):
    laptop.plays(*["lost"] * 13)
    assert laptop.run("watch", *RUN).returncode == 1
    assert journal(laptop)[-1].startswith("failed 12 times at step 0")
    assert (laptop.cloud / "starts-rae-w-0").read_text().count("\n") == 12


def test_watch_does_not_restart_if_one_host_reports_a_user_error(laptop):
    """The others have lost the connection to it."""
    (laptop.cloud / "starts-rae-w-1").write_text("\n")  # this host starts with line 2
    laptop.plays("lost", "exit 2")
    assert laptop.run("watch", *RUN).returncode == 2
    assert "an error that a restart cannot fix" in journal(laptop)[-1]


@pytest.mark.slow
def test_watch_gives_up_after_five_failures_without_progress(laptop):
    laptop.plays(*["crash"] * 9)
    done = laptop.run("watch", *RUN)
    assert done.returncode == 1
    assert [line for line in journal(laptop) if "retrying in" in line] == [
        f"the run failed ({n}): retrying in {30 * 2 ** (n - 1)} s" for n in range(1, 5)
    ]
    assert journal(laptop)[-1].startswith("failed 5 times at step 0")
    assert (laptop.cloud / "starts-rae-w-0").read_text().count("\n") == 5


@pytest.mark.slow
def test_watch_kills_hosts_that_hang_after_a_failure(laptop):
    (laptop.cloud / "starts-rae-w-1").write_text("\n\n")  # this host starts with line 3
    laptop.plays("deaf", "exit 0", "exit 1", "exit 0")
    laptop.do("watch", *RUN)
    lines = journal(laptop)
    assert "the remaining hosts do not exit: killed" in lines
    assert lines[-1].startswith("complete")


def test_watch_respects_a_stop_and_another_watch(laptop):
    laptop.plays("train")
    watch = subprocess.Popen(**laptop.command("watch", *RUN), stdout=subprocess.PIPE)
    try:
        for line in watch.stdout:
            if "2 running," in line:
                break
        assert "another watch.sh supervises rae" in error_of(laptop.run("watch", *RUN))
        laptop.do("stop")
        watch.communicate(timeout=20)
        assert watch.returncode == 75
    finally:
        watch.kill()
    assert journal(laptop)[-1] == "stopped at step 100, by infra/stop.sh"


def test_watch_changes_nothing_while_the_pod_is_unreachable(laptop):
    laptop.plays("train")
    laptop.up()
    laptop.do("launch", *RUN)
    laptop.wait_for("running -", "running -")
    watch = subprocess.Popen(**laptop.command("watch", *RUN), stdout=subprocess.PIPE)
    try:
        lines = iter(watch.stdout)
        next(line for line in lines if "2 of 2 answer" in line)
        (laptop.cloud / "unreachable").write_text("rae-w-1")
        next(line for line in lines if "1 of 2 answer" in line)
        (laptop.cloud / "silent").touch()
        next(line for line in lines if "pod: unknown" in line)
        (laptop.cloud / "silent").unlink()
        (laptop.cloud / "unreachable").unlink()
        next(line for line in lines if "2 of 2 answer" in line)
    finally:
        watch.kill()
        watch.wait()
    verbs = {call[4] for call in laptop.all_calls() if call[:3] == ["gcloud", "compute", "tpus"]}
    assert verbs == {"create", "describe", "ssh"}
    assert (laptop.cloud / "starts-rae-w-0").read_text().count("\n") == 1
