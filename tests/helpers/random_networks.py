"""Inception with RANDOM weights in the published format: tests the code, not the quality."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from random_loss_networks import random_network
from torch import Tensor, nn

from rae_xla.evaluate.feature_networks import FeatureModule
from rae_xla.evaluate.inception import CLASSES, FEATURES, SPATIAL_CHANNELS


def random_extractor(seed: int = 0, features: tuple[str, ...] = ("2048",)) -> nn.Module:
    """Return torch-fidelity's Inception with random weights that preserve the scale of inputs."""
    import torch_fidelity.feature_extractor_inceptionv3 as published

    network_class = published.FeatureExtractorInceptionV3
    with (
        mock.patch.object(published, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network_class, "load_state_dict"),
    ):
        return random_network(lambda: network_class("inception-v3-compat", list(features)), seed)


def write_inception(path: Path, seed: int = 0) -> Path:
    """Write a weight file in the format of torch-fidelity and return its path."""
    torch.save(random_extractor(seed).state_dict(), path)
    return path


class SmallFeatures(FeatureModule):
    """A network that compiles quickly, with features of the names and sizes of Inception's."""

    source = "small random network"

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.spatial = nn.Conv2d(3, SPATIAL_CHANNELS, 8, stride=8)
            self.pool = nn.Linear(3 * 8 * 8, FEATURES)
            self.classes = nn.Linear(FEATURES, CLASSES, bias=False)
        self.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Return features of images (B, 3, H, W) uint8, as :class:`Inception` does."""
        images = (pixels.float() - 128) / 128
        pool = self.pool(nn.functional.adaptive_avg_pool2d(images, 8).flatten(1)).relu()
        maps = self.spatial(images).permute(0, 2, 3, 1).flatten(1)
        return {"pool": pool, "spatial": maps, "logits": self.classes(pool)}
