"""The same images give the same numbers, whatever the batch size and the number of devices.

The networks have the real architectures and RANDOM weights: what is proved is that nothing depends
on how the images were fed, not what the numbers are worth.
"""

import json

import pytest
from random_loss_networks import write_vgg16
from random_networks import write_inception
from tiny import make_configs, make_shards, rae_xla

pytestmark = pytest.mark.xla

IMAGES = 26
METRICS = ("psnr", "ssim", "lpips", "rfid")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shards = make_shards(folder)
    write_inception(folder / "inception.pth")
    write_vgg16(folder / "vgg16.pth")
    return {"folder": folder, "shards": shards} | make_configs(folder, shards)


def evaluate(world, devices, batch, *overrides):
    out = world["folder"] / "report.json"
    done = rae_xla("evaluate", "recon", "--config", world["stage2"], "--data", world["shards"],
                   "--num-images", IMAGES, "--batch-size", batch, "--out", out,
                   "runtime.backend=xla", f"runtime.devices={devices}", *overrides,
                   f"weights.inception={world['folder'] / 'inception.pth'}",
                   f"weights.vgg16={world['folder'] / 'vgg16.pth'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"on {devices} XLA devices" in done.stdout
    return {name: m["value"] for name, m in json.loads(out.read_text())["metrics"].items()}


@pytest.fixture(scope="module")
def expected(world):
    return evaluate(world, 1, 64)


@pytest.mark.parametrize(
    ("devices", "batch", "overrides"),
    [
        (1, 7, []),
        (4, 64, []),
        pytest.param(4, 1, [], marks=slow),
        pytest.param(4, 7, ["mesh.ici.data=2", "mesh.ici.fsdp=2"], marks=slow),
    ],
)
def test_neither_the_batch_nor_the_devices_change_a_number(
    world, expected, devices, batch, overrides
):
    found = evaluate(world, devices, batch, *overrides)
    assert tuple(found) == METRICS
    assert found == pytest.approx(expected, rel=0, abs=1e-6)


@slow
def test_a_second_evaluation_compiles_nothing(world):
    """As while training: the networks are placed once, the decoder's weights have changed."""
    import torch

    from rae_xla.config import MeshConfig, RuntimeConfig, load_config
    from rae_xla.data.shards import open_index
    from rae_xla.evaluate.inception import FeatureNetwork, load_inception
    from rae_xla.evaluate.reconstruction import evaluate_reconstruction
    from rae_xla.models.lpips import load_lpips
    from rae_xla.registry import instantiate
    from rae_xla.runtime import start

    runtime = start(RuntimeConfig(backend="xla", devices=4), MeshConfig())
    rae = instantiate(load_config(str(world["stage2"])).stage_1)
    runtime.place(rae).train()
    weights = [str(world["folder"] / name) for name in ("vgg16.pth", "inception.pth")]
    lpips = runtime.place(load_lpips(weights[0], None))
    features = FeatureNetwork(load_inception(weights[1]), runtime)

    def measure(**options):
        return evaluate_reconstruction(
            rae, runtime, open_index(world["shards"]), lpips=lpips, features=features, **options
        )

    first = measure(num_images=5)
    assert rae.training
    compiled = runtime.compilations()
    again = measure(num_images=5, reference=first.reference)
    assert again.metrics == first.metrics
    with torch.no_grad():
        rae.decoder.decoder_pred.bias.add_(0.1)
    runtime.synchronize()
    update = runtime.compilations() - compiled
    changed = measure(num_images=4, batch_size=3)  # the originals are others, too
    assert changed.metrics["psnr"] != first.metrics["psnr"]
    assert runtime.compilations() == compiled + update
    assert runtime.fallbacks() == {}
