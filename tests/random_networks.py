"""Inception with RANDOM weights, in the published format: for plumbing, not for quality."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from random_loss_networks import drawn
from torch import nn


def random_extractor(seed: int = 0, features: tuple[str, ...] = ("2048",)) -> nn.Module:
    """torch-fidelity's Inception with random weights that keep the scale of their inputs."""
    import torch_fidelity.feature_extractor_inceptionv3 as published

    network_class = published.FeatureExtractorInceptionV3
    with (
        mock.patch.object(published, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network_class, "load_state_dict"),
    ):
        return drawn(lambda: network_class("inception-v3-compat", list(features)), seed)


def write_inception(path: Path, seed: int = 0) -> Path:
    """A file as torch-fidelity publishes it."""
    torch.save(random_extractor(seed).state_dict(), path)
    return path
