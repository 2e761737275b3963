"""Metrics do not depend on the batch size or the number of XLA devices.

Inception and VGG compile for minutes, so that only the nightly tests have LPIPS and the
features of Inception; by default a small network has features of the same names and sizes. All
weights are RANDOM. One process with one device measures both reconstructions and samples, and this
process has four devices and networks that all tests share.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from random_loss_networks import write_vgg16
from random_networks import SmallFeatures, write_inception
from tiny import environment, make_configs, make_shards, rae_xla

from rae_xla.config import MeshConfig, RuntimeConfig, load_config
from rae_xla.config.validation import RECON_METRICS
from rae_xla.data.shards.index import open_index
from rae_xla.evaluate.feature_networks import FeatureNetwork
from rae_xla.evaluate.generation import evaluate_generation
from rae_xla.evaluate.image_sets import open_images
from rae_xla.evaluate.inception import load_inception
from rae_xla.evaluate.reconstruction import evaluate_reconstruction
from rae_xla.evaluate.references import load_generation_reference
from rae_xla.interop.instantiate import instantiate
from rae_xla.models.lpips import load_lpips
from rae_xla.runtime import start

pytestmark = pytest.mark.xla

IMAGES = 10  # divisible neither by the number of devices nor by a batch size
GEN = ("fid", "sfid", "is", "precision", "recall")
RECON = {"small": ("psnr", "ssim", "rfid"), "inception": RECON_METRICS}
slow = pytest.mark.slow


@pytest.fixture(
    scope="module", params=["small", pytest.param("inception", marks=pytest.mark.nightly)]
)
def world(request, tmp_path_factory):
    """Shards, sets of images, and weights; ``features`` names the feature network."""
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    if request.param == "inception":
        write_inception(folder / "inception.pth")
    write_vgg16(folder / "vgg16.pth")
    rng = np.random.default_rng(0)
    sets = rng.integers(0, 256, (2, IMAGES, 32, 32, 3), dtype=np.uint8)
    sets[1, :4] = sets[0, :4]  # shared images, so that precision and recall are not zero
    for name, images in zip(("samples", "reference"), sets, strict=True):
        np.savez(folder / f"{name}.npz", arr_0=images)
    return {"folder": folder, "shards": shards, "features": request.param} | make_configs(
        folder, shards
    )


def settings(world, devices):
    return ["runtime.backend=xla", f"runtime.devices={devices}",
            f"weights.inception={world['folder'] / 'inception.pth'}",
            f"weights.vgg16={world['folder'] / 'vgg16.pth'}"]  # fmt: skip


def recon(world, devices, batch, *overrides):
    return ["recon", "--config", world["stage2"], "--data", world["shards"], "--num-images", IMAGES,
            "--batch-size", batch, "--out", world["folder"] / "recon.json",
            *settings(world, devices), *overrides,
            "--metrics", *RECON[world["features"]]]  # fmt: skip


def values(path):
    return {name: m["value"] for name, m in json.loads(path.read_text())["metrics"].items()}


# Both commands run in one process, so that the second reuses the compiled network.
BOTH = """
import json, sys
import random_networks, rae_xla.evaluate.inception
from rae_xla.cli.main import main
if sys.argv[1] == "small":
    rae_xla.evaluate.inception.load_inception = lambda *_: random_networks.SmallFeatures()
for command in json.loads(sys.argv[2]):
    assert main(["evaluate", *command]) == 0
"""


@pytest.fixture(scope="module")
def expected(world):
    """Return the metrics of reconstructions and of samples, on one device with batches of 7."""
    folder = world["folder"]
    gen = ["gen", "--samples", folder / "samples.npz", "--reference", folder / "reference.npz",
           "--batch-size", 7, "--out", folder / "gen.json", *settings(world, 1)]  # fmt: skip
    commands = [[str(argument) for argument in command] for command in (recon(world, 1, 7), gen)]
    with_helpers = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", BOTH, world["features"], json.dumps(commands)],
        env=environment() | with_helpers, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 1 XLA device") == 2
    return {name: values(folder / f"{name}.json") for name in ("recon", "gen")}


@pytest.fixture(scope="module")
def four(world):
    """Return a backend of four devices in this process, and networks placed on them."""
    backend = start(RuntimeConfig(backend="xla", devices=4), MeshConfig())
    rae = instantiate(load_config(str(world["stage2"])).stage_1)
    backend.place(rae).train()
    if world["features"] == "small":
        return backend, rae, None, FeatureNetwork(SmallFeatures(), backend)
    lpips = backend.place(load_lpips(str(world["folder"] / "vgg16.pth"), None))
    inception = load_inception(str(world["folder"] / "inception.pth"))
    return backend, rae, lpips, FeatureNetwork(inception, backend)


def measure(world, four, **options):
    backend, rae, lpips, features = four
    options.setdefault("metrics", RECON[world["features"]])
    return evaluate_reconstruction(
        rae, backend, open_index(world["shards"]), lpips=lpips, features=features, **options
    )


@pytest.fixture(scope="module")
def first(world, four):
    return measure(world, four, num_images=IMAGES)


def assert_same_values(values, expected):
    """Check values to 1e-6, and rFID relative to its value.

    rFID of these random features is 61, and float32 features do not determine it to 1e-6. Its
    relative tolerance is 1e-7 (measured: 2.3e-8).
    """
    values, expected = dict(values), dict(expected)
    assert values.pop("rfid") == pytest.approx(expected.pop("rfid"), rel=1e-7)
    assert values == pytest.approx(expected, rel=0, abs=1e-6)


def test_reconstruction_metrics_do_not_depend_on_batch_or_devices(world, expected, first):
    assert tuple(first.metrics) == RECON[world["features"]]
    assert_same_values(first.metrics, expected["recon"])


def test_generation_metrics_do_not_depend_on_batch_or_devices(world, four, expected):
    backend, _, _, features = four
    path = str(world["folder"] / "reference.npz")
    report = evaluate_generation(
        [open_images(world["folder"] / "samples.npz")],
        backend,
        [features],
        metrics=GEN,
        reference=load_generation_reference(path, 32, backend, [features], GEN),
    )
    [(_, computed)] = report.sets
    assert set(GEN) < set(computed)
    assert computed == pytest.approx(expected["gen"], rel=1e-6, abs=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize("world", ["inception"], indirect=True)  # the command line loads the file
def test_another_mesh_changes_nothing(world, expected):
    done = rae_xla("evaluate", *recon(world, 4, 1, "mesh.ici.data=2", "mesh.ici.fsdp=2"))
    assert done.returncode == 0, done.stderr
    assert "on 4 XLA devices" in done.stdout
    found = values(world["folder"] / "recon.json")
    assert_same_values(found, expected["recon"])


@slow
def test_a_second_evaluation_compiles_nothing(world, four, first):
    """As during training: the networks stay placed, and the decoder's weights change."""
    backend, rae, lpips, _ = four
    assert rae.training
    compiled = backend.compilations()
    again = measure(world, four, num_images=IMAGES, batch_size=1, reference=first.reference)
    assert again.metrics == first.metrics
    with torch.no_grad():
        rae.decoder.decoder_pred.bias.add_(0.1)
    backend.synchronize()
    update = backend.compilations() - compiled
    # the feature network has no weights that change
    metrics = ("psnr",) if lpips is None else ("psnr", "lpips")
    changed = measure(world, four, num_images=4, batch_size=3, metrics=metrics)
    assert changed.metrics["psnr"] != first.metrics["psnr"]
    assert backend.compilations() == compiled + update
    assert backend.fallbacks() == {}
