"""Runs of several processes of the torch backend, over gloo: the numbers of one process."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import (
    SMOOTH,
    environment,
    make_configs,
    make_gan_config,
    make_shards,
    metrics,
    rae_xla_processes,
    same_bits,
    saved,
)

slow = pytest.mark.slow

MESHES = {
    "2 fsdp": (2, []),
    "2 data": (2, ["mesh.ici.data=2"]),
    "2 data x 2 fsdp": (4, ["mesh.ici.data=2"]),
    "2 slices x 2 fsdp": (4, ["mesh.dcn.data=2"]),
}
LOSSES = ("train/l1", "train/lpips", "train/gan", "train/disc/loss", "train/loss")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    configs = make_configs(folder, shards) | {"gan": make_gan_config(folder, shards)}
    return {"folder": folder, "shards": shards} | configs


def train(world, config, name, count, *overrides):
    """Train on ``count`` processes; return the metrics and the completed processes."""
    folder = world["folder"] / name
    task = "stage2" if config == "stage2" else "stage1"
    done = rae_xla_processes(
        count, "train", task, "--config", world[config], "--results-dir", folder, *overrides
    )
    assert [process.returncode for process in done] == [0] * count, done[0].stderr
    return metrics(folder), done


@pytest.fixture(scope="module")
def alone(world):
    return train(world, "stage2", "alone", 1)[0]


@pytest.fixture(scope="module")
def split(world):
    return train(world, "stage2", "split", 2)


def same_losses(ours, theirs, rel=1e-4):
    for one, other in zip(ours, theirs, strict=True):
        for name in ("train/loss", "train/grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=rel), (one["step"], name)


def test_fsdp_gives_the_losses_of_one_process_and_only_process_0_prints(alone, split, world):
    lines, (first, second) = split
    same_losses(lines, alone)
    assert "on 2 torch devices (CPU), mesh data=1 x fsdp=2, fp32" in first.stderr
    assert "rae" not in second.stdout + second.stderr
    assert "step" not in second.stdout + second.stderr
    ours, theirs = (saved(world["folder"] / name) for name in ("split", "alone"))
    for part in ("model", "ema"):
        for name, tensor in theirs[part].items():
            torch.testing.assert_close(ours[part][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "mesh",
    ["2 data", "2 data x 2 fsdp", pytest.param("2 slices x 2 fsdp", marks=pytest.mark.nightly)],
)
def test_every_mesh_gives_the_losses_of_one_process(alone, world, mesh):
    count, overrides = MESHES[mesh]
    same_losses(train(world, "stage2", mesh, count, *overrides)[0], alone)


def test_a_run_resumes_with_the_same_bits_and_on_one_process(alone, split, world):
    complete = world["folder"] / "split"
    for name, count in (("resumed", 2), ("moved", 1)):
        folder = world["folder"] / name
        shutil.copytree(complete, folder)
        shutil.rmtree(folder / "checkpoints/step-00000020")
        lines, done = train(world, "stage2", name, count)
        assert "starting at step 10" in done[0].stderr
        same_losses(lines, alone)
    same_bits(complete, world["folder"] / "resumed")


@slow
@pytest.mark.parametrize("mesh", ["2 fsdp", "2 data"])
def test_the_gan_step_gives_the_losses_of_one_process(world, mesh):
    count, overrides = MESHES[mesh]
    several = train(
        world, "gan", f"gan {mesh}", count, *SMOOTH, *overrides, "training.sample_every=5"
    )[0]
    if not (world["folder"] / "gan").exists():
        train(world, "gan", "gan", 1, *SMOOTH)
    for one, other in zip(several, metrics(world["folder"] / "gan"), strict=True):
        for name in LOSSES:
            assert one[name] == pytest.approx(other[name], rel=1e-4), (one["step"], name)
        # Gradients of the global batch and their ratio, not those of one process's rows. In later
        # steps rounding decides whether rectifiers pass single pixels (see SMOOTH).
        tolerance = 1e-5 if one["step"] == 1 else 0.05
        for name in ("train/grad_norm", "train/disc/grad_norm", "train/adaptive_weight"):
            assert one[name] == pytest.approx(other[name], rel=tolerance), (one["step"], name)


@slow
@pytest.mark.parametrize(
    "state", ["sharded", pytest.param("replicated", marks=pytest.mark.nightly)]
)
def test_a_gan_run_resumes_with_the_same_bits(world, state):
    overrides = ["training.steps=16"] + (["mesh.ici.data=2"] if state == "replicated" else [])
    complete, folder = (world["folder"] / f"gan {state} {name}" for name in ("complete", "resumed"))
    train(world, "gan", complete.name, 2, *overrides)
    shutil.copytree(complete, folder)
    shutil.rmtree(folder / "checkpoints/step-00000016")
    _, done = train(world, "gan", folder.name, 2, *overrides)
    assert "starting at step 14" in done[0].stderr
    same_bits(complete, folder, step=16)


@slow
def test_bf16_gives_the_losses_of_one_process(world):
    bf16 = ["runtime.precision=bf16"]
    one = train(world, "stage2", "bf16 alone", 1, *bf16)[0]
    # Label embeddings and partial sums of gradients are rounded to bf16 too.
    same_losses(train(world, "stage2", "bf16 split", 2, *bf16)[0], one, rel=2e-3)


@slow
def test_accumulated_gradients_give_the_losses_of_one_process(alone, world):
    same_losses(
        train(world, "stage2", "accumulated", 2, "training.grad_accum_steps=2")[0], alone, rel=1e-3
    )


@pytest.mark.nightly  # compiles for a minute; test_fsdp.py compares compiled gradients by default
@pytest.mark.parametrize("remat", [0, 1])
def test_compiled_blocks_change_no_number(alone, world, remat):
    settings = ["runtime.compile=true", "training.steps=4", "checkpoint.every_steps=4"]
    settings.append(f"runtime.remat={remat}")
    lines, _ = train(world, "stage2", f"compiled {remat}", 2, *settings)
    same_losses(lines, alone[:4])
    # blocks of the encoder, of the transformer, and of its head
    assert {line["perf/compilations"] for line in lines} == {3}


@slow
def test_rematerialised_blocks_change_no_number(alone, world):
    same_losses(train(world, "stage2", "rematerialised", 2, "runtime.remat=1")[0], alone)


@slow
def test_images_and_statistics_do_not_depend_on_the_processes(alone, world):
    images, statistics = [], []
    for count in (1, 2):
        out = world["folder"] / f"samples-{count}"
        done = rae_xla_processes(
            count, "sample", "--config", world["stage2"], "--ckpt", world["folder"] / "alone",
            "--out", out, "--num-samples", 4, "--batch-size", 3, "guidance.scale=1.5",
        )  # fmt: skip
        assert [process.returncode for process in done] == [0] * count, done[0].stderr
        with np.load(out / "samples.npz") as arrays:
            images.append(arrays["arr_0"].astype(int))
        out = world["folder"] / f"statistics-{count}.pt"
        done = rae_xla_processes(
            count, "stats", "--config", world["stage1"], "--data", world["shards"], "--out", out,
            "--batch-size", 46,
        )  # fmt: skip
        assert [process.returncode for process in done] == [0] * count, done[0].stderr
        statistics.append(torch.load(out, weights_only=True))
    assert np.abs(images[0] - images[1]).max() <= 1
    torch.testing.assert_close(*statistics, rtol=1e-5, atol=1e-6)


@slow
def test_reconstruction_metrics_do_not_depend_on_the_processes(world):
    decoder = "stage_1.params.pretrained_decoder_path=" + re.search(
        r"pretrained_decoder_path: (.*)", world["stage2"].read_text()
    )[1]  # fmt: skip
    metric_lines = []
    for count in (1, 2):
        done = rae_xla_processes(
            count, "evaluate", "recon", "--config", world["stage1"], "--data", world["shards"],
            "--metrics", "psnr", "ssim", "--num-images", 21, decoder,
        )  # fmt: skip
        assert [process.returncode for process in done] == [0] * count, done[0].stderr
        metric_lines.append(re.findall(r"(?m)^ *(?:psnr|ssim) .*$", done[0].stdout))
        assert not any("psnr" in process.stdout for process in done[1:])
    assert len(metric_lines[0]) == 2
    assert metric_lines[0] == metric_lines[1]


def test_an_impossible_mesh_is_reported_once(world):
    folder = world["folder"] / "impossible"
    done = rae_xla_processes(
        2, "train", "stage2", "--config", world["stage2"], "--results-dir", folder,
        "mesh.ici.tensor=2",
    )  # fmt: skip
    assert done[0].returncode == 2
    lines = [line for process in done for line in process.stderr.splitlines() if "rae-xla" in line]
    assert len(lines) == 1
    assert re.search(r"mesh\.ici\.tensor is 2.*xla backend", lines[0])


@pytest.mark.nightly  # by default test_kills.py starts runs with torchrun
def test_torchrun_starts_a_run(alone, world):
    folder = world["folder"] / "torchrun"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "rae_xla", "train", "stage2", "--config", str(world["stage2"]),
            "--results-dir", str(folder), "runtime.backend=auto",
        ],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    same_losses(metrics(folder), alone)


@slow
def test_an_error_of_one_process_is_reported_by_that_process(world):
    """The shards of process 1 are broken; torchrun ends the others."""
    broken = world["folder"] / "broken"
    shutil.copytree(world["shards"], broken)
    (broken / "index.json").unlink()
    script = 'if [ "$RANK" = 1 ]; then d=%s; else d=%s; fi; exec %s -m rae_xla "$@" data.train=$d'
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--no-python", "bash", "-c", script % (broken, world["shards"], sys.executable), "-",
            "train", "stage2", "--config", str(world["stage2"]),
            "--results-dir", str(world["folder"] / "half"),
        ],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "rae-xla:" in line]
    assert len(lines) == 1
    assert re.search(r"rae-xla: process 1: error: .*broken", lines[0])
