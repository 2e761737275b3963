"""Both tasks on XLA: the same numbers on every topology, one compilation, no host fallback.

Each run is a separate process, as a user would start it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import (
    environment,
    make_configs,
    make_shards,
    metrics,
    rae_xla,
    same_bits,
    train_and_kill,
)

pytestmark = pytest.mark.xla

TOPOLOGIES = {
    "1 device": ["runtime.devices=1"],
    "4 fsdp": ["runtime.devices=4"],
    "2 data x 2 fsdp": ["runtime.devices=4", "mesh.ici.data=2"],
    "2 fsdp x 2 tensor": ["runtime.devices=4", "mesh.ici.tensor=2"],
    "2 slices of 2 fsdp": ["runtime.devices=4", "mesh.dcn.data=2"],
    "8 fsdp": ["runtime.devices=8"],
    "2 data x 4 fsdp": ["runtime.devices=8", "mesh.ici.data=2"],
    "4 fsdp x 2 tensor": ["runtime.devices=8", "mesh.ici.tensor=2"],
    "2 slices of 4 fsdp": ["runtime.devices=8", "mesh.dcn.data=2"],
}
# Topologies of eight devices differ only in size from those of four.
TOPOLOGY_PARAMETERS = [
    pytest.param(name, marks=pytest.mark.nightly if "runtime.devices=8" in settings else [])
    for name, settings in TOPOLOGIES.items()
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder} | make_configs(folder, make_shards(folder))


def train(world, task, name, *overrides):
    folder = world["folder"] / name
    done = rae_xla("train", task, "--config", world[task], "--results-dir", folder, *overrides)
    assert done.returncode == 0, done.stderr
    assert "is traced at each call" not in done.stderr  # every step is replayed
    return metrics(folder)


@pytest.fixture(scope="module")
def on_torch(world):
    return train(world, "stage2", "torch")


def same_losses(lines, expected_lines):
    for one, other in zip(lines, expected_lines, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), one["step"]


@pytest.mark.parametrize("topology", TOPOLOGY_PARAMETERS)
def test_every_topology_has_the_losses_of_plain_torch(world, on_torch, topology):
    on_xla = train(world, "stage2", topology, "runtime.backend=xla", *TOPOLOGIES[topology])
    same_losses(on_xla, on_torch)
    assert {line["perf/compilations"] for line in on_xla} == {1}
    assert {line["perf/fallbacks"] for line in on_xla} == {0}


@pytest.mark.slow
def test_each_of_eight_devices_holds_an_eighth_of_the_state():
    """Parameters, both moments and the average, including replicated tensors."""
    script = Path(__file__).parents[1] / "helpers" / "state_on_eight.py"
    done = subprocess.run(
        [sys.executable, script], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["trained"] >= 20e6
    assert len(found["on_device"]) == 8
    assert found["total"] >= 16 * found["trained"]  # these four, in float32
    assert max(found["on_device"].values()) <= 1.05 * found["total"] / 8


@pytest.mark.slow
def test_scan_changes_neither_losses_nor_checkpoints(world):
    """Checkpoints have every block by itself: a run resumes with or without scan."""
    deep = "stage_2.params.depth=[4,2]"
    loop = ["runtime.backend=xla", "runtime.scan=true", *TOPOLOGIES["2 data x 2 fsdp"], deep]
    half = "training.steps=10"
    on_torch = train(world, "stage2", "deep-torch", deep)
    on_xla = train(world, "stage2", "from-loop", *loop, half)
    assert {line["perf/compilations"] for line in on_xla} == {1}
    assert {line["perf/fallbacks"] for line in on_xla} == {0}
    same_losses(train(world, "stage2", "from-loop", deep), on_torch)
    train(world, "stage2", "to-loop", deep, half)
    same_losses(train(world, "stage2", "to-loop", *loop, "runtime.remat=0.5"), on_torch)


@pytest.mark.slow
def test_rematerialisation_changes_no_loss(world, on_torch):
    on_xla = train(world, "stage2", "remat", "runtime.backend=xla", "runtime.remat=1",
                   *TOPOLOGIES["2 fsdp x 2 tensor"])  # fmt: skip
    same_losses(on_xla, on_torch)


def test_stage_1_has_the_losses_of_plain_torch(world):
    on_xla = train(world, "stage1", "stage1-xla", "runtime.backend=xla", *TOPOLOGIES["4 fsdp"])
    assert {line["perf/compilations"] for line in on_xla} == {1}
    assert {line["perf/fallbacks"] for line in on_xla} == {0}
    same_losses(on_xla, train(world, "stage1", "stage1-torch"))
    assert on_xla[-1]["train/loss"] < 0.9 * on_xla[0]["train/loss"]


@pytest.mark.nightly
@pytest.mark.parametrize("task", ["stage1", "stage2"])
def test_two_hundred_steps_compile_once_without_fallbacks(world, task):
    overrides = ["training.steps=201", "checkpoint.every_steps=50", "runtime.backend=xla"]
    lines = train(world, task, f"hundreds-{task}", *overrides, *TOPOLOGIES["8 fsdp"])
    assert len(lines) == 201
    assert {line["perf/compilations"] for line in lines} == {1}
    assert {line["perf/fallbacks"] for line in lines} == {0}


@pytest.mark.slow
def test_a_killed_and_resumed_run_is_bit_identical(world):
    topology = "2 data x 2 fsdp"
    common = ["runtime.backend=xla", *TOPOLOGIES[topology]]
    uninterrupted, folder = world["folder"] / topology, world["folder"] / "killed"
    if not uninterrupted.exists():  # the run of test_every_topology_has_the_losses_of_plain_torch
        train(world, "stage2", topology, *common)
    train_and_kill("stage2", world["stage2"], folder, *common)
    assert not (folder / "checkpoints/step-00000020").exists()
    train(world, "stage2", "killed", *common)
    same_bits(uninterrupted, folder)


def test_a_run_resumes_on_another_backend(world, on_torch):
    train(world, "stage2", "moved", "training.steps=10")
    moved = train(world, "stage2", "moved", "runtime.backend=xla", *TOPOLOGIES["4 fsdp"])
    same_losses(moved, on_torch)


def test_sampling_on_xla_gives_the_images_of_plain_torch(world, on_torch):
    import numpy as np

    sets = {}
    for backend in ("torch", "xla"):
        out = world["folder"] / f"samples-{backend}"
        done = rae_xla("sample", "--config", world["stage2"], "--ckpt", world["folder"] / "torch",
                       "--out", out, "--num-samples", 8, "--batch-size", 4, "guidance.scale=1.5",
                       f"runtime.backend={backend}", "runtime.devices=4")  # fmt: skip
        assert done.returncode == 0, done.stderr
        with np.load(out / "samples.npz") as arrays:
            sets[backend] = arrays["arr_0"].astype(int)
    assert np.abs(sets["torch"] - sets["xla"]).max() <= 1


def test_statistics_on_xla_equal_those_of_plain_torch(world):
    files = []
    for backend in ("torch", "xla"):
        out = world["folder"] / f"stat-{backend}.pt"
        done = rae_xla("stats", "--config", world["stage1"], "--out", out, "--batch-size", 20,
                       f"runtime.backend={backend}", "runtime.devices=4")  # fmt: skip
        assert done.returncode == 0, done.stderr
        files.append(torch.load(out, weights_only=True))
    torch.testing.assert_close(files[0], files[1], rtol=1e-5, atol=1e-5)
