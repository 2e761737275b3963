"""SIGKILL at random moments, SIGTERM, a bucket that goes away: what is left is always whole."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gcs_emulator import GcsEmulator
from tiny import CLASSES, environment, make_configs, make_shards, metrics

from rae_xla.data import storage
from rae_xla.interop.checkpoint_folder import (
    Checkpoint,
    checkpoint_path,
    list_checkpoints,
    read_manifest,
    rests,
    verify,
)
from rae_xla.interop.checkpoint_tensors import CheckpointContent
from rae_xla.train.survival import AGREE_EVERY, EXIT_STOPPED

STEPS, EVERY = 200, 4
KILLS = 15
"""In each storage: a third while the run starts, a third in a save, a third anywhere."""


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
    with forks(folder / "log.txt") as start:
        yield {"folder": folder, "config": config, "start": start, "log": folder / "log.txt"}


@contextmanager
def forks(log):
    """A function that starts a run, and gives its process number and a function to wait for it."""
    parent = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "forking.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment() | {"LOG": str(log)},
    )  # fmt: skip

    def start(arguments):
        parent.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
        parent.stdin.flush()
        return int(parent.stdout.readline()), lambda: int(parent.stdout.readline())

    try:
        yield start
    finally:
        parent.kill()
        parent.communicate()


def arguments(world, name, *overrides):
    return (
        "train", "stage2", "--config", world["config"], "--results-dir", world["folder"] / name,
        f"training.steps={STEPS}", f"checkpoint.every_steps={EVERY}", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(world):
    """A run that nothing disturbs."""
    _, wait = world["start"](arguments(world, "whole", "checkpoint.every_steps=1000"))
    assert wait() == 0, world["log"].read_text()
    return world["folder"] / "whole/checkpoints"


def same_bits(one, other, step):
    first, second = (
        CheckpointContent(Checkpoint(checkpoint_path(str(f), step))) for f in (one, other)
    )
    for part in ("model", "ema", "optimizer"):
        ours, theirs = first[part], second[part]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), part


def wait_until(condition, patience=120):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.002)
    raise TimeoutError


def all_whole(folder):
    """See that every committed checkpoint is what it says, and give their steps."""
    found = list_checkpoints(folder)
    for checkpoint in found:
        verify(checkpoint, read_manifest(checkpoint))
    return [checkpoint.step for checkpoint in found]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a disk", "a bucket"])
def test_killed_at_random_moments_a_run_ends_with_the_same_bits(world, whole, kind):
    dice = random.Random(7)
    name = kind.replace(" ", "-")
    place = f"gs://runs/{name}" if kind == "a bucket" else str(world["folder"] / "killed")
    command = arguments(world, name, f"checkpoint.dir={place}")
    moments = ["starting", "saving", "anywhere"] * (KILLS // 3)
    lasts, in_a_save, newest = 3.0, 0, 0
    for number, moment in enumerate(moments):
        began = time.monotonic()
        process, wait = world["start"](command)
        if moment == "starting":
            time.sleep(dice.uniform(0, lasts))
        else:
            if number > 3:  # it is to come further each time, but for the first
                before = newest
                wait_until(lambda before=before: newest_step(place) > before)
                lasts = time.monotonic() - began
            if moment == "saving":
                wait_until(lambda: rests(place))
            time.sleep(dice.uniform(0, 0.02 if moment == "saving" else 0.3))
        os.kill(process, signal.SIGKILL)
        assert wait() == -signal.SIGKILL, "it ended before it could be killed"
        in_a_save += bool(rests(place))
        steps = all_whole(place)
        assert max(steps, default=0) >= newest, "a committed checkpoint is gone"
        newest = max(steps, default=0)
    assert in_a_save >= 2
    assert EVERY < newest < STEPS
    _, wait = world["start"](command)
    assert wait() == 0, world["log"].read_text()
    assert all_whole(place)[-1] == STEPS
    assert rests(place) == []
    same_bits(whole, place, STEPS)
    assert [line["step"] for line in metrics(world["folder"] / name)] == list(range(1, STEPS + 1))
    print(f"{kind}: {len(moments)} kills, {in_a_save} of them in a save")


def newest_step(place):
    return max((checkpoint.step for checkpoint in list_checkpoints(place)), default=0)


def metrics_lines(world, name):
    path = world["folder"] / name / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_a_run_saves_exits_with_its_own_code_and_goes_on(world, number):
    name = f"stopped-{number}"
    command = arguments(world, name, "checkpoint.every_steps=1000")
    process, wait = world["start"](command)
    wait_until(lambda: len(metrics_lines(world, name)) > 5)
    os.kill(process, number)
    assert wait() == EXIT_STOPPED == 75
    folder = world["folder"] / name
    [step] = all_whole(str(folder / "checkpoints"))
    assert 5 < step < STEPS
    said = world["log"].read_text()
    assert f"step {step}: stopped, {signal.Signals(number).name}" in said
    process, wait = world["start"](arguments(world, name, f"training.steps={step + 2}"))
    assert wait() == 0
    assert f"from step {step} of " in world["log"].read_text()
    assert [line["step"] for line in metrics(folder)][-3:] == [step, step + 1, step + 2]


@pytest.mark.slow
def test_results_that_are_lost_leave_the_checkpoints_in_the_bucket(world, bucket):
    """As on a machine that was preempted and made anew."""
    place = "checkpoint.dir=gs://runs/lost"
    _, wait = world["start"](arguments(world, "lost-1", place, "training.steps=3"))
    assert wait() == 0
    command = arguments(world, "lost-2", place, "training.steps=6")
    _, wait = world["start"](command)
    assert wait() == 0
    assert [line["step"] for line in metrics(world["folder"] / "lost-2")] == [4, 5, 6]
    _, wait = world["start"]((*command, "training.optimizer.lr=1e-4"))
    assert wait() == 2
    refused = world["log"].read_text().splitlines()[-1]
    assert "gs://runs/lost holds checkpoints of a run of another configuration" in refused
    assert "another checkpoint.dir" in refused
    out = world["folder"] / "samples"
    _, wait = world["start"](
        ("sample", "--config", world["config"], "--out", out, "--num-samples", CLASSES,
         "stage_2.ckpt=gs://runs/lost")
    )  # fmt: skip
    assert wait() == 0, world["log"].read_text()
    assert (out / "samples.npz").exists()


@pytest.mark.slow
def test_a_bucket_that_goes_away_stops_no_training(world, bucket):
    bucket.inject(match="POST /upload.*", kind="503")
    command = arguments(
        world, "away", "checkpoint.dir=gs://runs/away", "training.steps=9",
        "checkpoint.retry_seconds=0", "checkpoint.every_steps=3",
    )  # fmt: skip
    _, wait = world["start"](command)
    assert wait() == 2
    bucket.clear_faults()
    assert [line["step"] for line in metrics(world["folder"] / "away")] == list(range(1, 10))
    said = world["log"].read_text()
    assert re.search(r"step 3: the checkpoint could not be written: gs://runs/away/.*503", said)
    assert "the checkpoint of step 9, the last, could not be written" in said
    assert not storage.exists("gs://runs/away/step-00000009/manifest.json")
    _, wait = world["start"](command)
    assert wait() == 0
    assert all_whole("gs://runs/away")[-1] == 9


@pytest.mark.slow
def test_one_of_two_is_told_to_stop_and_both_pass_over_what_is_broken(world):
    """Two processes with half of the state each, started by torchrun."""
    folder = world["folder"] / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def start(*overrides):
        command = arguments(world, "two", "mesh.ici.fsdp=2", *overrides)
        return subprocess.Popen(
            [*launcher, "-m", "rae_xla", *map(str, command)],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    first = start("training.steps=12", "checkpoint.every_steps=6")
    assert first.wait(timeout=240) == 0, first.stdout.read()
    assert all_whole(str(folder / "checkpoints")) == [6, 12]
    part = folder / "checkpoints/step-00000012/ema-1.distcp"
    part.write_bytes(part.read_bytes()[:-1] + b"?")

    second = start("training.steps=5000", "checkpoint.every_steps=4000")
    wait_until(lambda: [m for m in metrics(folder) if m["step"] > 14])
    children = Path(f"/proc/{second.pid}/task/{second.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    said = second.communicate(timeout=240)[0]
    assert "step-00000012 is broken: ema-1.distcp does not have the checksum" in said
    assert "from step 6 of " in said
    stopped = int(re.search(r"step (\d+): stopped, ", said)[1])
    assert stopped % AGREE_EVERY == 0
    assert f"exitcode  : {EXIT_STOPPED}" in said
    newest = list_checkpoints(str(folder / "checkpoints"))[-1]
    verify(newest, read_manifest(newest))
    assert newest.step == stopped
