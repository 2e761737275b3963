"""``rae-xla evaluate gen`` and evaluation during stage-2 training, with RANDOM networks."""

import json
import re

import numpy as np
import pytest
import torch
from golden_case import GOLDEN
from random_networks import random_extractor, write_inception
from tiny import (
    make_configs,
    make_shards,
    metrics,
    rae_xla,
    rae_xla_processes,
    same_bits,
    saved,
)
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from rae_xla.cli.main import run
from rae_xla.config import MeshConfig, RuntimeConfig, load_config
from rae_xla.errors import UserError
from rae_xla.runtime import start
from rae_xla.train.evaluators import GenerationEvaluator

COUNT = 10  # at least one image in each of the ten splits of torch-fidelity's score
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    rng = np.random.default_rng(0)
    images = {
        # both sets share images, so that precision and recall are not zero
        "reference": rng.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8),
        "samples": rng.integers(0, 220, (COUNT, 32, 32, 3), dtype=np.uint8),
    }
    images["samples"][:4] = images["reference"][:4]
    for name, pixels in images.items():
        np.savez(folder / f"{name}.npz", arr_0=pixels)
    settings = [f"weights.inception={write_inception(folder / 'inception.pth')}",
                "runtime.backend=torch"]  # fmt: skip
    return {
        "folder": folder, "shards": shards, "images": images, "settings": settings,
        "samples": folder / "samples.npz", "reference": folder / "reference.npz",
    } | make_configs(folder, shards)  # fmt: skip


def gen(world, *options, samples=None, reference=True):
    reference = ("--reference", world["reference"]) if reference else ()
    return ("evaluate", "gen", "--samples", samples or world["samples"], *reference, *options,
            *world["settings"])  # fmt: skip


def succeed(*command):
    done = rae_xla(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail(message, *command):
    """Run a command in this process and check its user error."""
    with pytest.raises(UserError, match=message):
        run([str(argument) for argument in command])


@pytest.fixture(scope="module")
def expected(world):
    out = world["folder"] / "expected.json"
    printed = succeed(*gen(world, "--out", out))
    return json.loads(out.read_text()), printed


@slow
def test_values_of_torch_fidelity(world, expected):
    network = random_extractor(features=("2048", "logits_unbiased"))
    (samples, logits), (reference, _) = (
        network(torch.from_numpy(world["images"][name].transpose(0, 3, 1, 2).copy()))
        for name in ("samples", "reference")
    )
    values = {name: entry["value"] for name, entry in expected[0]["metrics"].items()}
    both = [fid_features_to_statistics(rows.double()) for rows in (samples, reference)]
    fid = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    assert values["fid"] == pytest.approx(fid, rel=1e-4)
    score = isc_features_to_metric(logits)["inception_score_mean"]
    assert values["is_torch_fidelity"] == pytest.approx(score, rel=1e-4)
    coverage = calculate_precision_recall_full(samples, reference)
    assert (values["precision"], values["recall"]) == pytest.approx(coverage, rel=1e-4)
    assert values["sfid"] > 0
    assert values["is"] >= 1


@slow
def test_report_and_table(world, expected):
    found, printed = expected
    assert {entry["images"] for entry in found["metrics"].values()} == {COUNT}
    assert found["reference"]["kind"] == "images"
    assert found["reference"]["path"] == str(world["reference"])
    assert found["weights"]["inception"].endswith("inception.pth")
    assert found["config"] is None
    for name, entry in found["metrics"].items():
        assert re.search(rf"^  {name} +{entry['value']:.6f}$", printed, re.M)
    assert f"against {COUNT} images in {world['reference']} (sha256" in printed


@slow
def test_two_processes_share_the_work(world, expected):
    out = world["folder"] / "two.json"
    for done in rae_xla_processes(2, *gen(world, "--out", out, "--batch-size", 5)):
        assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["metrics"]
    assert list(found) == list(expected[0]["metrics"])
    for name, entry in found.items():
        assert entry["value"] == pytest.approx(expected[0]["metrics"][name]["value"], rel=1e-6)


MISUSES = [
    ("no samples", ["--samples", "none.npz"], "samples none.npz"),
    ("another's option", ["--ckpt", "a.pt"], "--ckpt applies to .* recon` and .* t2i`, not gen"),
    ("an unknown metric", ["--metrics", "gfid"], "--metrics gfid: .* fid sfid is precision"),
    ("too many", ["--num-images", COUNT + 1], f"{COUNT + 1} images .* has {COUNT}"),
    ("too few", ["--num-images", 3], "precision of 3 images .*at least 4"),
    ("no batch", ["--batch-size", 0], "--batch-size 0: expected"),
    ("an unused reference", ["--metrics", "is"], "--reference is not used"),
    ("no reference", ["--reference", "none.npz"], "reference none.npz"),
    ("no Inception", ["weights.inception=none.pth"], "none.pth"),
    ("no DINOv2", ["--metrics", "fd_dinov2", "weights.dinov2=./none"], "none.*--metrics fid"),
    ("no such setting", ["weights.incpetion=a"], "weights.inception"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "options", "message"), MISUSES, ids=[m[0] for m in MISUSES])
def test_misuse(world, what, options, message):
    fail(message, *gen(world), *options)


def test_missing_options(world):
    fail("fid needs --reference", *gen(world, reference=False))
    fail("evaluate gen needs --samples", "evaluate", "gen", "--metrics", "is")
    fail("evaluate recon needs --config", "evaluate", "recon")


def test_dino_distance_alone(world):
    """Inception is not loaded."""
    encoder = str(GOLDEN / "rae/dinov2/encoder")
    out = world["folder"] / "dino.json"
    options = ("--metrics", "fd_dinov2", "--out", out, f"weights.dinov2={encoder}")
    succeed(*gen(world, *options))
    found = json.loads(out.read_text())
    assert found["metrics"]["fd_dinov2"]["value"] > 0
    assert found["weights"] == {"dinov2": encoder}
    succeed(*gen(world, *options, samples=world["reference"]))
    assert json.loads(out.read_text())["metrics"]["fd_dinov2"]["value"] == pytest.approx(
        0, abs=1e-6
    )


# ---------------------------------------------------------------------------- during training


def train(world, name, *settings):
    folder = world["folder"] / name
    succeed("train", "stage2", "--config", world["stage2"], "--results-dir", folder,
            "training.steps=8", "checkpoint.every_steps=8", *world["settings"],
            *settings)  # fmt: skip
    return folder


# fd_dinov2 is cheap compared with Inception; weights, steps and side effects do not depend on the
# metric.
EVALUATION = [
    "eval.eval_interval=6", "eval.num_samples=8", "eval.lite_interval=2", "eval.lite_samples=4",
    "eval.metrics=[fd_dinov2]", f"weights.dinov2={GOLDEN / 'rae/dinov2/encoder'}",
    "eval.batch_size=4", "eval.eval_model=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(world):
    reference = f"eval.reference_npz_path={world['reference']}"
    return train(world, "evaluated", *EVALUATION, reference)


def test_lite_evaluations_precede_the_first_full_one(trained):
    lines = [line for line in metrics(trained) if any(name.startswith("eval/") for name in line)]
    lite = {"eval/fd_dinov2_lite", "eval/model/fd_dinov2_lite"}
    full = {"eval/fd_dinov2", "eval/model/fd_dinov2"}
    names = {line["step"]: {n for n in line if n.startswith("eval/")} for line in lines}
    assert names == {2: lite, 4: lite, 6: full, 8: full}


def test_ema_and_model_weights_are_evaluated(world, trained):
    """The values equal those of the same samples from the checkpoint."""
    logged = [line for line in metrics(trained) if "eval/fd_dinov2" in line][-1]
    assert logged["step"] == 8
    found = {}
    for which in ("ema", "model"):
        out = world["folder"] / f"sampled-{which}"
        weights = trained if which == "ema" else _model_weights(trained, world["folder"])
        succeed("sample", "--config", world["stage2"], "--ckpt", weights, "--out", out,
                "--num-samples", 8, "--seed", 0, *world["settings"])  # fmt: skip
        succeed(*gen(world, *EVALUATION[-3:-2], "--metrics", "fd_dinov2", "--out",
                     out / "report.json", samples=out))  # fmt: skip
        report = json.loads((out / "report.json").read_text())
        found[which] = report["metrics"]["fd_dinov2"]["value"]
    assert logged["eval/fd_dinov2"] == pytest.approx(found["ema"], rel=1e-4)
    assert logged["eval/model/fd_dinov2"] == pytest.approx(found["model"], rel=1e-4)
    assert abs(found["model"] / found["ema"] - 1) > 1e-2


def _model_weights(folder, where):
    """Write the checkpoint's weights without EMA as a bare state dict and return its path."""
    path = where / "model.pt"
    torch.save(dict(saved(folder, 8)["model"]), path)
    return path


@slow
def test_evaluation_does_not_change_training(world, trained):
    plain = train(world, "plain")
    same_bits(trained, plain, 8)
    losses = [
        [line["train/loss"] for line in metrics(folder) if "train/loss" in line]
        for folder in (trained, plain)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


@slow
def test_validation_images_are_the_default_reference(world):
    folder = world["folder"] / "validated"
    done = rae_xla("train", "stage2", "--config", world["stage2"], "--results-dir", folder,
                   "training.steps=1", *world["settings"], *EVALUATION[:-1],
                   f"data.val={world['shards']}", "eval.num_images=9")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"evaluation: the reference is the 9 originals in .*shards", done.stderr)
    assert any(line.get("eval/fd_dinov2", 0) > 0 for line in metrics(folder))


def test_errors_of_evaluation_during_training(world):
    backend = start(RuntimeConfig(backend="torch"), MeshConfig())

    def refuse(message, *settings):
        with pytest.raises(UserError, match=message):
            GenerationEvaluator(load_config(world["stage2"], settings), backend, 32)

    refuse(r"eval needs images .*reference_npz_path.*eval=null", "eval.num_samples=8")
    refuse("stage 2 has no .*psnr.* fid, sfid", "eval.metrics=[psnr]")
    refuse(r"eval\.lite_interval.*at least 0", "eval.lite_interval=-1")
    refuse(r"none.*weights\.dinov2.*eval\.metrics=\[fid\] or eval=null", *EVALUATION[4:5],
         "weights.dinov2=./none", "eval.reference_npz_path=none.npz")  # fmt: skip
    refuse(r"none\.npz", *EVALUATION[4:6],
         "eval.reference_npz_path=none.npz")  # fmt: skip
