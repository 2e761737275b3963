"""RAEv2's options in runs: Muon on several processes, resume, sampling with internal guidance."""

import pytest
import raev2_tiny
from golden_case import GOLDEN
from tiny import (
    make_configs,
    make_shards,
    metrics,
    rae_xla,
    rae_xla_processes,
    same_bits,
    saved,
    train_and_kill,
)

OPTIONS = [*raev2_tiny.TRANSFORMER, *raev2_tiny.MUON, *raev2_tiny.POSTHOC]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder} | make_configs(folder, make_shards(folder))


@pytest.fixture(scope="module")
def alone(world):
    folder = world["folder"] / "alone"
    done = rae_xla(
        "train", "stage2", "--config", world["stage2"], "--results-dir", folder, *OPTIONS
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_matrices_have_one_moment(alone):
    optimizer = saved(alone)["optimizer"]
    assert "blocks.0.attn.qkv.weight/exp_avg" in optimizer
    assert "blocks.0.attn.qkv.weight/exp_avg_sq" not in optimizer
    assert "blocks.0.attn.qkv.bias/exp_avg_sq" in optimizer


def test_average_of_another_width_is_sampled(world, alone):
    """``checkpoints ema`` on the run's checkpoints, and sampling with what it writes."""
    out = world["folder"] / "average.pt"
    done = rae_xla("checkpoints", "ema", alone, "--width", 0.07, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "average of width 0.07 after step" in done.stdout
    done = rae_xla(
        "sample", "--config", world["stage2"], "--ckpt", out, "--out", world["folder"] / "averaged",
        "--num-samples", 4, "--batch-size", 4, *raev2_tiny.TRANSFORMER,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_internal_guidance_changes_samples(world, alone):
    images = []
    for scale in (1.0, 1.5):
        out = world["folder"] / f"samples-{scale}"
        done = rae_xla(
            "sample", "--config", world["stage2"], "--ckpt", alone, "--out", out,
            "--num-samples", 4, "--batch-size", 4, *raev2_tiny.TRANSFORMER,
            "guidance.method=internal", f"guidance.scale={scale}", "guidance.cfg.scale=1.2",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        images.append((out / "samples.npz").read_bytes())
    assert images[0] != images[1]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["mesh.ici.data=2", "mesh.ici.fsdp=2"]])
def test_several_processes_have_the_losses_of_one(world, alone, overrides):
    count = 4 if overrides else 2
    folder = world["folder"] / f"processes-{count}"
    done = rae_xla_processes(
        count, "train", "stage2", "--config", world["stage2"], "--results-dir", folder,
        *OPTIONS, "training.steps=10", *overrides,
    )  # fmt: skip
    assert [process.returncode for process in done] == [0] * count, done[0].stderr
    for one, other in zip(metrics(folder), metrics(alone)[:10], strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4), one["step"]


@pytest.mark.slow
def test_killed_run_ends_with_the_same_bits(world, alone):
    folder = world["folder"] / "killed"
    train_and_kill("stage2", world["stage2"], folder, *OPTIONS)
    done = rae_xla(
        "train", "stage2", "--config", world["stage2"], "--results-dir", folder, *OPTIONS
    )
    assert done.returncode == 0, done.stderr
    same_bits(folder, alone)


def test_repa_loss_is_added_and_its_projection_trained(world, alone):
    encoder = str(GOLDEN / "rae/dinov2/encoder")
    folder = world["folder"] / "repa"
    done = rae_xla(
        "train", "stage2", "--config", world["stage2"], "--results-dir", folder,
        *raev2_tiny.TRANSFORMER, "stage_2.params.repa_layer_depth=1", "stage_2.params.z_dim=32",
        f"repa.encoder_config_path={encoder}", "repa.encoder_input_size=56",
        "training.steps=10",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state = saved(folder, 10)
    projection = state["model"]["repa_projector.weight"]
    assert projection.shape == (32, 32)
    assert state["optimizer"]["repa_projector.weight/exp_avg"].any()
    # At first the model and its projection know nothing: the loss is larger by the alignment.
    assert metrics(folder)[0]["train/loss"] > metrics(alone)[0]["train/loss"] + 0.1


def test_repa_encoder_with_other_tokens_is_refused(world):
    encoder = str(GOLDEN / "rae/dinov2/encoder")
    done = rae_xla(
        "train", "stage2", "--config", world["stage2"], "--results-dir", world["folder"] / "no",
        "stage_2.params.repa_layer_depth=1", "stage_2.params.z_dim=32",
        f"repa.encoder_config_path={encoder}", "repa.encoder_input_size=28",
    )  # fmt: skip
    assert done.returncode == 2
    assert "has 4 tokens of 32 channels, but the model aligns 16 tokens" in done.stderr
