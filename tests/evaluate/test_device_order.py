"""Reconstructions and decoders are measured right in any order of the devices of a pod."""

import numpy as np
import pytest
import torch
from evaluation_host import Host, on_hosts
from pod_topologies import HYBRID, OWNERS
from torch import nn

from rae_xla.data.shards.index import open_index
from rae_xla.data.shards.sources import array_source
from rae_xla.data.shards.writer import write_shards
from rae_xla.evaluate.decoders import compare_decoders
from rae_xla.evaluate.reconstruction import evaluate_reconstruction
from rae_xla.evaluate.references import Reference

SIDE = 16
ORDERS = {"v5e:4x4": OWNERS["v5e:4x4"], "hybrid": HYBRID, "alternating": (1, 0, 1, 0)}
orders = pytest.mark.parametrize("owners", ORDERS.values(), ids=ORDERS)


class Perfect(nn.Module):
    """An autoencoder whose reconstructions are the images, or darker ones."""

    image_size, latent_size = SIDE, (3, SIDE, SIDE)

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor
        self.decoder = nn.Identity()

    def forward(self, images):
        return images * self.factor

    def decode(self, latents):
        return self.decoder(latents)


class MeanColours:
    """A stand-in for Inception: the mean colours of the quarters of an image."""

    def __call__(self, pixels):
        return nn.functional.adaptive_avg_pool2d(pixels.float(), 2).flatten(1)


class Distance:
    """A stand-in for LPIPS: the mean absolute difference."""

    def __call__(self, first, second):
        return (first - second).abs().flatten(1).mean(1)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (150, SIDE, SIDE, 3), dtype=np.uint8)  # 128 are a full chunk
    folder = tmp_path_factory.mktemp("shards") / "shards"
    write_shards(array_source(images, np.zeros(150, np.int64), shuffle=False), str(folder))
    return open_index(str(folder))


def metrics(index, host, factor):
    report = evaluate_reconstruction(
        Perfect(factor), host, index, lpips=Distance(), features=MeanColours(), batch_size=1
    )
    return report.metrics


@orders
@pytest.mark.parametrize("factor", [1.0, 0.8], ids=["identical", "darker"])
def test_reconstructions(index, owners, factor):
    expected = metrics(index, Host(), factor)
    if factor == 1:
        assert expected["psnr"] == 100
    found = on_hosts(
        max(owners) + 1, len(owners), lambda host: metrics(index, host, factor), owners
    )
    for values in found:
        assert values == pytest.approx(expected, rel=1e-9, abs=1e-9)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, latents):
        return latents * self.factor


def compare(host, latents):
    decoders = {"one": Scaled(1.0), "dark": Scaled(0.5)}
    images = Reference("images", "somewhere", len(latents), "", reference_gaussian())
    return compare_decoders(
        Perfect(), host, latents, decoders, ["a", "b"], features=MeanColours(), reference=images
    )


def reference_gaussian():
    from rae_xla.evaluate.frechet import Gaussian

    return Gaussian(torch.full((12,), 100.0).double(), torch.eye(12).double() * 50)


@orders
def test_decoders(owners):
    latents = np.random.default_rng(1).random((150, 3, SIDE, SIDE), dtype=np.float32)
    expected = compare(Host(), latents)
    found = on_hosts(max(owners) + 1, len(owners), lambda host: compare(host, latents), owners)
    for report in found:
        assert np.array_equal(report.grid, expected.grid)
        for one, other in zip(report.results, expected.results, strict=True):
            assert one.psnr_to_first == pytest.approx(other.psnr_to_first, rel=1e-9)
            assert one.fid == pytest.approx(other.fid, rel=1e-6)
