"""Stage 1 with LPIPS and the discriminator through the command line, on plain torch."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from golden_case import GOLDEN
from PIL import Image
from random_networks import write_inception
from tiny import (
    PHASES,
    SMOOTH,
    make_gan_config,
    make_shards,
    metrics,
    rae_xla,
    same_bits,
    saved,
    train_and_kill,
)

from rae_xla.config import load_config
from rae_xla.data.mixture import open_training_data
from rae_xla.errors import UserError
from rae_xla.interop.instantiate import instantiate
from rae_xla.runtime import start
from rae_xla.train import trainer

PARTS = ("model", "ema", "optimizer", "disc", "disc_optimizer")
LAST = "checkpoints/step-00000020"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    return {"folder": folder, "shards": shards, "config": make_gan_config(folder, shards)}


def train(world, name, *overrides):
    folder = world["folder"] / name
    return rae_xla(
        "train", "stage1", "--config", world["config"], "--results-dir", folder, *overrides
    )


@pytest.fixture(scope="module")
def finished(world):
    done = train(world, "whole", "training.sample_every=10")
    assert done.returncode == 0, done.stderr
    return world["folder"] / "whole", done


def test_the_losses_start_at_their_epochs(finished):
    folder, done = finished
    for step, phase in PHASES.items():
        assert f"step {step}: phase {phase} starts\n" in done.stderr
    for line in metrics(folder):
        names = line.keys()
        assert {"train/l1", "train/lpips", "train/grad_norm", "train/skipped"} <= names
        assert ("train/disc/loss" in names) == (line["step"] > 6)
        assert ("train/disc/accuracy" in names) == (line["step"] > 6)
        assert ("train/disc/grad_norm" in names) == (line["step"] > 6)
        assert ("train/gan" in names) == (line["step"] > 12)
        assert ("train/adaptive_weight" in names) == (line["step"] > 12)
        assert line["train/skipped"] == 0


def test_losses_fall_and_the_discriminator_schedule_counts_its_updates(finished):
    lines = metrics(finished[0])
    assert lines[-1]["train/l1"] < 0.7 * lines[0]["train/l1"]
    assert [line.get("opt/disc_count") for line in lines] == [None] * 6 + list(range(14))
    # warm-up over its first three updates, as the decoder's over the run's first four
    rates = [line["opt/disc_lr"] for line in lines[6:]]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3] + [1e-3] * 12, rel=1e-5)


def test_the_preview_shows_inputs_reconstructions_and_errors(finished):
    folder, _ = finished
    paths = sorted((folder / "samples").iterdir())
    assert [p.name for p in paths] == [f"stage1-{step:08d}.png" for step in (0, 10, 20)]
    first, last = (np.asarray(Image.open(p)).astype(int) for p in (paths[0], paths[-1]))
    assert first.shape == last.shape == (4 * 34 + 2, 4 * 34 + 2 + 8 * len("error x 4"), 3)
    assert np.array_equal(first[:34], last[:34])  # the inputs
    errors = [grid[-36:, 80:].mean() for grid in (first, last)]
    assert errors[1] < errors[0]


def test_a_checkpoint_has_the_published_keys(finished, world):
    content = saved(finished[0])
    assert {*PARTS, "step", "scheduler", "config"} == set(content)
    published = json.loads((GOLDEN / "keymaps/discriminator_S_16_ks3.json").read_text())["keys"]
    ours = {k: list(v.shape) for k, v in content["disc"].items()}
    head = {k: v for k, v in published.items() if k.startswith("heads.0.")}
    assert {k for k in ours if k.startswith("heads.0.")} == head.keys()
    assert all(len(ours[k]) == len(shape) for k, (shape, _) in head.items())
    whole = instantiate(load_config(str(world["config"])).stage_1)
    whole.load_state_dict(content["ema"])
    assert content["scheduler"]["next_step"]["disc_count"] == 14


def test_a_run_killed_in_every_phase_is_bit_identical(finished, world):
    folder = world["folder"] / "killed"
    for step in (4, 8, 14):
        train_and_kill("stage1", world["config"], folder, step=step)
        assert not (folder / LAST).exists(), "it was not killed before its end"
    done = train(world, "killed")
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"starting at step (\d+)", done.stderr)[1]) >= 14
    assert [line["step"] for line in metrics(folder)] == list(range(1, 21))
    same_bits(finished[0], folder)


def one_error(done, *patterns):
    lines = [line for line in done.stderr.splitlines() if "rae-xla: error:" in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for pattern in patterns:
        assert re.search(pattern, lines[0]), lines[0]


def diverge(world, name, *overrides, **rates):
    """Train in this process with learning rates that no configuration may have.

    Returns:
        The error that ends the run.
    """
    config = load_config(world["config"], ["training.clip_grad=0", *overrides])
    training, schedule = config.training, replace(config.training.scheduler, **rates)
    config = replace(config, training=replace(training, scheduler=schedule))
    data = open_training_data(config.data.train, config.data.weights)
    backend = start(config.runtime, config.mesh)
    with pytest.raises(UserError) as error:
        trainer.train(config, backend, data, "stage1", world["folder"] / name)
    return str(error.value)


def test_non_finite_steps_are_skipped_and_many_in_a_row_end_the_run(world, caplog):
    """The first step destroys the weights; they are neither saved nor reported as good."""
    error = diverge(world, "exploding", "training.max_skipped=4", base_lr=1e38, warmup_steps=0)
    assert re.search(r"4 steps in a row.*there is no checkpoint from before them", error)
    assert "lower learning" in error
    lines = metrics(world["folder"] / "exploding")
    assert [line["train/skipped"] for line in lines][:4] == [0, 1, 1, 1]
    assert all("train/loss" not in line for line in lines[1:]), "there is no step to average"
    assert "step 2: no checkpoint, since the last 1 steps were skipped" in caplog.text
    assert not list((world["folder"] / "exploding/checkpoints").glob("step-*"))


def test_the_last_good_checkpoint_is_reported(world, finished):
    """The learning rate rises until the weights overflow."""
    error = diverge(
        world, "rising", "training.max_skipped=4", "training.steps=20", "training.max_rollbacks=0",
        "training.scheduler.warmup_steps=4", "training.scheduler.decay_end_steps=5",
        base_lr=1e-4, final_lr=1e38,
    )  # fmt: skip
    assert re.search(r"last good checkpoint.*step-00000004;.*stage_1\.ckpt=", error)
    content = saved(world["folder"] / "rising", step=4)
    assert all(t.abs().max() < 1e3 for t in content["model"].values() if t.is_floating_point())


@pytest.mark.nightly  # minutes where the CPU has no bf16
def test_bf16_is_close_to_fp32(finished, world):
    done = train(world, "bf16", "runtime.precision=bf16", "training.steps=14")  # every phase
    assert done.returncode == 0, done.stderr
    in_bf16 = metrics(world["folder"] / "bf16")
    assert len(in_bf16) == 14
    for ours, theirs in zip(in_bf16, metrics(finished[0]), strict=False):
        assert ours["train/skipped"] == 0
        assert ours["train/l1"] == pytest.approx(theirs["train/l1"], rel=0.03)
        assert ours["train/lpips"] == pytest.approx(theirs["train/lpips"], rel=0.1)


@pytest.mark.nightly
def test_torch_compile_gives_the_same_numbers(world):
    settings = [*SMOOTH, "training.steps=3", "checkpoint.every_steps=3"]
    for name in ("compiled", "eager"):
        done = train(world, name, *settings, f"runtime.compile={name == 'compiled'}".lower())
        assert done.returncode == 0, done.stderr
    runs = [metrics(world["folder"] / name) for name in ("compiled", "eager")]
    for ours, theirs in zip(*runs, strict=True):
        for name in ("train/l1", "train/lpips", "train/gan", "train/disc/loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        ("weights.vgg16=no.pth", (r"no\.pth", r"weights\.vgg16", "perceptual_weight=0")),
        ("weights.lpips=no.pth", (r"no\.pth", r"weights\.lpips", "perceptual_weight=0")),
        (
            "gan.disc.arch.dino_ckpt_path=no.pth",
            (r"no\.pth", "RAE-collections", "dino_ckpt_path", "disc_weight=0"),
        ),
        ("gan.disc.arch.dino_ckpt_path=null", ("dino_ckpt_path is not set", "disc_weight=0")),
        ("gan.disc.arch.recipe=S_9", (r"recipe.*S_9.*S_8",)),
        ("gan.disc.arch.key_depths=[7]", (r"key_depths \[7\].*blocks 0 to 1",)),
        ("eval.metrics=[]", (r"eval\.metrics.*eval: null",)),
        ("gan.loss.disc_upd_start=3", (r"disc_upd_start.*disc_start",)),
    ],
)
def test_a_missing_file_of_the_losses_is_one_error(world, override, patterns):
    one_error(train(world, "lacking", override), *patterns)


def test_a_training_checkpoint_as_decoder_is_refused(finished, world):
    weights = f"stage_1.params.pretrained_decoder_path={finished[0] / LAST}"
    one_error(train(world, "whole-2", weights), "training checkpoint.*rae-xla checkpoints export")


def test_evaluation_while_training(world):
    """Evaluate the average and the decoder on 20 images; the numbers equal `evaluate recon`."""
    settings = [
        "eval.eval_interval=10", "eval.num_images=20", "eval.eval_model=true",
        "eval.metrics=[psnr,ssim,lpips]", f"eval.data_path={world['shards']}",
    ]  # fmt: skip
    done = train(world, "evaluated", "gan.loss.disc_weight=0", *settings)
    assert done.returncode == 0, done.stderr
    lines = [m for m in metrics(world["folder"] / "evaluated") if "eval/psnr" in m]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[1]["eval/model/psnr"] > lines[0]["eval/model/psnr"]
    report = world["folder"] / "report.json"
    alone = rae_xla(
        "evaluate", "recon", "--config", world["config"], "--ckpt", world["folder"] / "evaluated",
        "--data", world["shards"], "--num-images", 20, "--metrics", "psnr", "ssim", "lpips",
        "--out", report,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    found = json.loads(report.read_text())["metrics"]
    for name in ("psnr", "ssim", "lpips"):
        assert found[name]["value"] == pytest.approx(lines[1][f"eval/{name}"], rel=1e-6)
    assert "the reference is" not in done.stderr  # no metric has a reference
    later = train(world, "unevaluated", "gan.loss.disc_weight=0", "eval.eval_interval=10")
    one_error(later, r"eval\.data_path=SHARDS or data\.val=SHARDS.*eval=null")


def test_rfid_in_training_reports_its_reference(world):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    reference = world["folder"] / "reference.npz"
    np.savez(reference, arr_0=pixels)
    done = train(
        world, "rfid", "gan.loss.disc_weight=0", "training.steps=2", "eval.eval_interval=1",
        "eval.metrics=[rfid]", "eval.num_images=6", f"eval.data_path={world['shards']}",
        f"eval.reference_npz_path={reference}",
        f"weights.inception={write_inception(world['folder'] / 'inception.pth')}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"eval/rfid: the reference is 6 images in {reference} (sha256") == 1
    values = [m["eval/rfid"] for m in metrics(world["folder"] / "rfid") if "eval/rfid" in m]
    assert len(values) == 2
    assert min(values) > 0


def test_training_with_l1_alone(world):
    done = train(
        world, "plain", "gan.loss.disc_weight=0", "gan.loss.perceptual_weight=0",
        "weights.vgg16=no.pth", "gan.disc.arch.dino_ckpt_path=null", "training.steps=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train/lpips" not in metrics(world["folder"] / "plain")[0]
