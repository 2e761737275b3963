"""The same images give the same numbers, whatever the batch size and the number of devices.

The networks have the real architectures and RANDOM weights: what is proved is that nothing depends
on how the images were fed, not what the numbers are worth. Most of the time goes into compiling
Inception for each number of devices, and each device always works on eight images: so there is one
process of a single device that measures both reconstructions and samples, and one of four, this
one, whose networks all tests share.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from random_loss_networks import write_vgg16
from random_networks import write_inception
from tiny import environment, make_configs, make_shards, rae_xla

from rae_xla.config import MeshConfig, RuntimeConfig, load_config
from rae_xla.config.check import GEN_METRICS, RECON_METRICS
from rae_xla.data.shards import open_index
from rae_xla.evaluate.gen_reference import load_gen_reference
from rae_xla.evaluate.generation import evaluate_generation
from rae_xla.evaluate.inception import FeatureNetwork, load_inception
from rae_xla.evaluate.picture_sets import open_pictures
from rae_xla.evaluate.reconstruction import evaluate_reconstruction
from rae_xla.models.lpips import load_lpips
from rae_xla.registry import instantiate
from rae_xla.runtime import start

pytestmark = pytest.mark.xla

IMAGES = 10  # no number of devices or of images at a time divides it evenly
GEN = tuple(name for name in GEN_METRICS if name != "fd_dinov2")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    write_inception(folder / "inception.pth")
    write_vgg16(folder / "vgg16.pth")
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 256, (2, IMAGES, 32, 32, 3), dtype=np.uint8)
    drawn[1, :4] = drawn[0, :4]  # so that the sets have something in common
    for name, images in zip(("samples", "reference"), drawn, strict=True):
        np.savez(folder / f"{name}.npz", arr_0=images)
    return {"folder": folder, "shards": shards} | make_configs(folder, shards)


def settings(world, devices):
    return ["runtime.backend=xla", f"runtime.devices={devices}",
            f"weights.inception={world['folder'] / 'inception.pth'}",
            f"weights.vgg16={world['folder'] / 'vgg16.pth'}"]  # fmt: skip


def recon(world, devices, batch, *overrides):
    return ["recon", "--config", world["stage2"], "--data", world["shards"], "--num-images", IMAGES,
            "--batch-size", batch, "--out", world["folder"] / "recon.json",
            *settings(world, devices), *overrides]  # fmt: skip


def values(path):
    return {name: m["value"] for name, m in json.loads(path.read_text())["metrics"].items()}


# Both in one process: what is compiled for the first serves the second.
BOTH = """
import json, sys
from rae_xla.cli.main import main
for command in json.loads(sys.argv[1]):
    assert main(["evaluate", *command]) == 0
"""


@pytest.fixture(scope="module")
def expected(world):
    """Of one device, seven images at a time: of reconstructions and of samples."""
    folder = world["folder"]
    gen = ["gen", "--samples", folder / "samples.npz", "--reference", folder / "reference.npz",
           "--batch-size", 7, "--out", folder / "gen.json", *settings(world, 1)]  # fmt: skip
    commands = [[str(word) for word in command] for command in (recon(world, 1, 7), gen)]
    done = subprocess.run(
        [sys.executable, "-c", BOTH, json.dumps(commands)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("on 1 XLA device") == 2
    return {name: values(folder / f"{name}.json") for name in ("recon", "gen")}


@pytest.fixture(scope="module")
def four(world):
    """A runtime of four devices in this process, and the networks on them."""
    runtime = start(RuntimeConfig(backend="xla", devices=4), MeshConfig())
    rae = instantiate(load_config(str(world["stage2"])).stage_1)
    runtime.place(rae).train()
    weights = [str(world["folder"] / name) for name in ("vgg16.pth", "inception.pth")]
    lpips = runtime.place(load_lpips(weights[0], None))
    features = FeatureNetwork(load_inception(weights[1]), runtime)
    return runtime, rae, lpips, features


def measure(world, four, **options):
    runtime, rae, lpips, features = four
    return evaluate_reconstruction(
        rae, runtime, open_index(world["shards"]), lpips=lpips, features=features, **options
    )


@pytest.fixture(scope="module")
def first(world, four):
    return measure(world, four, num_images=IMAGES)


def same_numbers(found, expected):
    """To 1e-6. The distance of these random features is 61, so 1e-6 of it would be less than the
    float32 they are computed in can tell: to 1e-7 of itself (measured: 2.3e-8).
    """
    found, expected = dict(found), dict(expected)
    assert found.pop("rfid") == pytest.approx(expected.pop("rfid"), rel=1e-7)
    assert found == pytest.approx(expected, rel=0, abs=1e-6)


def test_neither_the_batch_nor_the_devices_change_a_number(expected, first):
    assert tuple(first.metrics) == RECON_METRICS
    same_numbers(first.metrics, expected["recon"])


def test_nor_do_they_of_samples(world, four, expected):
    runtime, _, _, features = four
    path = str(world["folder"] / "reference.npz")
    report = evaluate_generation(
        [open_pictures(world["folder"] / "samples.npz")],
        runtime,
        [features],
        metrics=GEN,
        reference=load_gen_reference(path, 32, runtime, [features], GEN),
    )
    [(_, found)] = report.sets
    assert set(GEN) < set(found)
    assert found == pytest.approx(expected["gen"], rel=1e-6, abs=1e-6)


@slow
def test_nor_does_another_mesh(world, expected):
    done = rae_xla("evaluate", *recon(world, 4, 1, "mesh.ici.data=2", "mesh.ici.fsdp=2"))
    assert done.returncode == 0, done.stderr
    assert "on 4 XLA devices" in done.stdout
    found = values(world["folder"] / "recon.json")
    same_numbers(found, expected["recon"])


@slow
def test_a_second_evaluation_compiles_nothing(world, four, first):
    """As while training: the networks are placed once, the decoder's weights have changed."""
    runtime, rae, _, _ = four
    assert rae.training
    compiled = runtime.compilations()
    again = measure(world, four, num_images=IMAGES, batch_size=1, reference=first.reference)
    assert again.metrics == first.metrics
    with torch.no_grad():
        rae.decoder.decoder_pred.bias.add_(0.1)
    runtime.synchronize()
    update = runtime.compilations() - compiled
    metrics = ("psnr", "lpips")  # Inception takes no weights that have changed
    changed = measure(world, four, num_images=4, batch_size=3, metrics=metrics)
    assert changed.metrics["psnr"] != first.metrics["psnr"]
    assert runtime.compilations() == compiled + update
    assert runtime.fallbacks() == {}
