"""Killed and stopped runs, and an unreachable bucket: checkpoints stay intact and runs resume."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gcs_emulator import GcsEmulator
from tiny import (
    CLASSES,
    environment,
    make_configs,
    make_shards,
    metrics,
    rae_xla_processes,
    start_rae_xla,
)

from rae_xla import storage
from rae_xla.checkpoint.manager import (
    Checkpoint,
    checkpoint_path,
    incomplete_checkpoints,
    list_checkpoints,
    read_checkpoint_manifest,
    verify,
)
from rae_xla.checkpoint.tensors import CheckpointContent
from rae_xla.errors import EXIT_CONNECTION_LOST
from rae_xla.train.callbacks.preemption import EXIT_STOPPED

STEPS, EVERY = 200, 4
KILLS = [6, pytest.param(15, marks=pytest.mark.nightly)]
"""Per storage: a third during the start of the run, a third during a save, a third at any time."""


@pytest.fixture(scope="module")
def bucket():
    with GcsEmulator() as emulator, pytest.MonkeyPatch.context() as patch:
        emulator.create_bucket("runs")
        for name, value in emulator.environment().items():
            patch.setenv(name, value)
        patch.setenv("RAE_XLA_GCS_TIMEOUT", "0.5")
        yield emulator


@pytest.fixture(scope="module")
def world(tmp_path_factory, bucket):
    folder = tmp_path_factory.mktemp("world")
    config = make_configs(folder, make_shards(folder))["stage2"]
    return {"folder": folder, "config": config, "log": folder / "log.txt"}


def start(world, command):
    return start_rae_xla(*command, log=world["log"])


def log(world):
    return world["log"].read_text()


def run_to_the_end(world, command):
    """Run a command; returns its exit code."""
    return start(world, command).wait()


def arguments(world, name, *overrides):
    return (
        "train", "stage2", "--config", world["config"], "--results-dir", world["folder"] / name,
        f"training.steps={STEPS}", f"checkpoint.every_steps={EVERY}", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(world):
    """The checkpoints of a run that is not interrupted."""
    command = arguments(world, "undisturbed", "checkpoint.every_steps=1000")
    assert run_to_the_end(world, command) == 0, log(world)
    return world["folder"] / "undisturbed/checkpoints"


def same_bits(one, other, step):
    first, second = (
        CheckpointContent(Checkpoint(checkpoint_path(str(f), step))) for f in (one, other)
    )
    for part in ("model", "ema", "optimizer"):
        ours, theirs = first[part], second[part]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), part


def wait_until(condition, timeout=120):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.002)
    raise TimeoutError


def verified_steps(folder):
    """Verify every committed checkpoint; returns their steps."""
    found = list_checkpoints(folder)
    for checkpoint in found:
        verify(checkpoint, read_checkpoint_manifest(checkpoint))
    return [checkpoint.step for checkpoint in found]


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("kind", ["a disk", "a bucket"])
def test_a_run_killed_at_random_times_ends_with_the_same_bits(world, undisturbed, kind, kills):
    dice = random.Random(7)
    name = f"{kind.replace(' ', '-')}-{kills}"
    place = f"gs://runs/{name}" if kind == "a bucket" else str(world["folder"] / f"killed-{kills}")
    command = arguments(world, name, f"checkpoint.dir={place}")
    moments = ["starting", "saving", "anywhere"] * (kills // 3)
    duration, in_a_save, newest = 3.0, 0, 0
    for number, moment in enumerate(moments):
        began = time.monotonic()
        process = start(world, command)
        if moment == "starting":
            time.sleep(dice.uniform(0, duration))
        else:
            if number > 3:  # later attempts get further than the ones before
                before = newest
                wait_until(lambda before=before: newest_step(place) > before)
                duration = time.monotonic() - began
            if moment == "saving":
                wait_until(lambda: incomplete_checkpoints(place))
            time.sleep(dice.uniform(0, 0.02 if moment == "saving" else 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        in_a_save += bool(incomplete_checkpoints(place))
        steps = verified_steps(place)
        assert max(steps, default=0) >= newest, "a committed checkpoint was lost"
        newest = max(steps, default=0)
    assert in_a_save >= kills // 6
    assert EVERY < newest < STEPS
    assert run_to_the_end(world, command) == 0, log(world)
    assert verified_steps(place)[-1] == STEPS
    assert incomplete_checkpoints(place) == []
    same_bits(undisturbed, place, STEPS)
    assert [line["step"] for line in metrics(world["folder"] / name)] == list(range(1, STEPS + 1))
    print(f"{kind}: {len(moments)} kills, {in_a_save} of them in a save")


def newest_step(place):
    return max((checkpoint.step for checkpoint in list_checkpoints(place)), default=0)


def metrics_lines(world, name):
    path = world["folder"] / name / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_exits_with_75_and_resumes(world, number):
    name = f"stopped-{number}"
    command = arguments(world, name, "checkpoint.every_steps=1000")
    process = start(world, command)
    wait_until(lambda: len(metrics_lines(world, name)) > 5)
    process.kill(number)
    assert process.wait() == EXIT_STOPPED == 75
    folder = world["folder"] / name
    [step] = verified_steps(str(folder / "checkpoints"))
    assert 5 < step < STEPS
    assert re.search(rf"step {step}: stopped.*{signal.Signals(number).name}", log(world))
    assert run_to_the_end(world, arguments(world, name, f"training.steps={step + 2}")) == 0
    assert re.search(rf"at step {step}\b.*step-{step:08d}", log(world))
    assert [line["step"] for line in metrics(folder)][-3:] == [step, step + 1, step + 2]


@pytest.mark.slow
def test_a_run_resumes_from_a_bucket_without_its_results_folder(world, bucket):
    """As on a new machine after a preemption."""
    place = "checkpoint.dir=gs://runs/lost"
    assert run_to_the_end(world, arguments(world, "lost-1", place, "training.steps=3")) == 0
    command = arguments(world, "lost-2", place, "training.steps=6")
    assert run_to_the_end(world, command) == 0
    assert [line["step"] for line in metrics(world["folder"] / "lost-2")] == [4, 5, 6]
    assert run_to_the_end(world, (*command, "training.optimizer.lr=1e-4")) == 2
    error = log(world).splitlines()[-1]
    assert "gs://runs/lost" in error
    assert "training.optimizer.lr" in error
    assert "another checkpoint.dir" in error
    out = world["folder"] / "samples"
    command = (
        "sample", "--config", world["config"], "--out", out, "--num-samples", CLASSES,
        "stage_2.ckpt=gs://runs/lost",
    )  # fmt: skip
    assert run_to_the_end(world, command) == 0, log(world)
    assert (out / "samples.npz").exists()


@pytest.mark.slow
def test_training_continues_without_its_bucket(world, bucket):
    bucket.inject(match="POST /upload.*", kind="503", skip=1)  # the test of write access
    command = arguments(
        world, "away", "checkpoint.dir=gs://runs/away", "training.steps=9",
        "checkpoint.retry_seconds=0", "checkpoint.every_steps=3",
    )  # fmt: skip
    assert run_to_the_end(world, command) == EXIT_CONNECTION_LOST
    bucket.clear_faults()
    assert [line["step"] for line in metrics(world["folder"] / "away")] == list(range(1, 10))
    text = log(world)
    assert re.search(r"step 3: the checkpoint could not be written: gs://runs/away/.*503", text)
    assert re.search(r"error: .*checkpoint.*\b9\b.*could not be written", text)
    assert not storage.exists("gs://runs/away/step-00000009/manifest.json")
    assert run_to_the_end(world, command) == 0
    assert verified_steps("gs://runs/away")[-1] == 9


@pytest.mark.slow
def test_two_processes_skip_a_broken_checkpoint_and_stop_together(world):
    """With half of the state each; resumed by torchrun, one of them gets SIGTERM."""
    folder = world["folder"] / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    first = arguments(
        world, "two", "mesh.ici.fsdp=2", "training.steps=12", "checkpoint.every_steps=6"
    )
    done = rae_xla_processes(2, *first)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    assert verified_steps(str(folder / "checkpoints")) == [6, 12]
    part = folder / "checkpoints/step-00000012/ema-1.distcp"
    part.write_bytes(part.read_bytes()[:-1] + b"?")

    resumed = arguments(
        world, "two", "mesh.ici.fsdp=2", "training.steps=5000", "checkpoint.every_steps=4000"
    )
    second = subprocess.Popen(
        [*launcher, "-m", "rae_xla", *map(str, resumed)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: [m for m in metrics(folder) if m["step"] > 14])
    children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    output = second.communicate(timeout=240)[0]
    assert output.count("step-00000012 is broken: ema-1.distcp") == 1
    assert re.search(r"at step 6\b.*step-00000006", output)
    stopped = int(re.search(r"step (\d+): stopped", output)[1])
    assert f"exitcode  : {EXIT_STOPPED}" in output
    newest = list_checkpoints(str(folder / "checkpoints"))[-1]
    verify(newest, read_checkpoint_manifest(newest))
    assert newest.step == stopped


@pytest.mark.slow
def test_a_stopped_torchrun_saves_although_it_signals_the_data_workers_too(world):
    """torchrun sends SIGTERM to whole process groups: two processes, each with two data workers."""
    folder = world["folder"] / "torchrun"
    command = arguments(
        world, "torchrun", "data.num_workers=2", "training.steps=100000",
        "checkpoint.every_steps=50000",
    )  # fmt: skip
    launcher = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "rae_xla", *map(str, command),
        ],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: len(metrics_lines(world, "torchrun")) > 5)
    began = time.monotonic()
    launcher.terminate()
    output = launcher.communicate(timeout=120)[0]
    assert time.monotonic() - began < 25, "torchrun kills its processes after 30 s"
    assert "data worker process died" not in output, output
    [step] = verified_steps(str(folder / "checkpoints"))
    assert f"step {step}: stopped (SIGTERM)" in output
    assert metrics(folder)[-1]["step"] == step
