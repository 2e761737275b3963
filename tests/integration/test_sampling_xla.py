"""`rae-xla sample` writes bit-identical images on any number of XLA devices."""

import numpy as np
import pytest
from sampling_world import command, make_world, sampled_images
from tiny import rae_xla

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder, "config": make_world(folder)}


@pytest.fixture(scope="module")
def one_device(world):
    return sample(world, "one", "runtime.backend=xla", "runtime.devices=1")


def sample(world, out, *settings):
    done = rae_xla(*command(world, out, "--keep-latents", *settings))
    assert done.returncode == 0, done.stderr
    return sampled_images(world, out), np.load(world["folder"] / out / "latents.npy")


@pytest.mark.parametrize("devices", [4, pytest.param(8, marks=pytest.mark.nightly)])
def test_several_devices_equal_one(world, one_device, devices):
    results = sample(world, f"on-{devices}", "runtime.backend=xla", f"runtime.devices={devices}")
    for several, one in zip(results, one_device, strict=True):
        assert np.array_equal(several, one)


@pytest.mark.slow
def test_torch_equals_xla_up_to_rounding(world, one_device):
    """Kernels differ between the backends; pixels differ by at most one level."""
    images, latents = sample(world, "torch", "runtime.backend=torch")
    assert np.abs(images.astype(int) - one_device[0]).max() <= 1
    np.testing.assert_allclose(latents, one_device[1], rtol=0, atol=1e-5)
