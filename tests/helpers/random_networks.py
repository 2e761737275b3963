"""Inception with RANDOM weights in the published format: tests the code, not the quality."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from random_loss_networks import random_network
from torch import nn


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
