"""The same 200 pictures, to the bit, on any number of XLA devices."""

import numpy as np
import pytest
from sampling_world import command, make_world, pictures
from tiny import rae_xla

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"folder": folder, "config": make_world(folder)}


@pytest.fixture(scope="module")
def alone(world):
    return drawn(world, "one", "runtime.backend=xla", "runtime.devices=1")


def drawn(world, out, *where):
    done = rae_xla(*command(world, out, "--keep-latents", *where))
    assert done.returncode == 0, done.stderr
    return pictures(world, out), np.load(world["folder"] / out / "latents.npy")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [4, 8])
def test_on_several_devices_as_on_one(world, alone, devices):
    made = drawn(world, f"on-{devices}", "runtime.backend=xla", f"runtime.devices={devices}")
    for ours, theirs in zip(made, alone, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_as_by_torch_but_for_its_rounding(world, alone):
    """Other kernels; no value of a pixel is off by more than one."""
    made = drawn(world, "torch", "runtime.backend=torch")
    assert np.abs(made[0].astype(int) - alone[0]).max() <= 1
    np.testing.assert_allclose(made[1], alone[1], rtol=0, atol=1e-5)
