"""Encoders on XLA: the tokens of the CPU, without a fallback to the host."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_case import GOLDEN
from hf_encoders import MODELS, save_model

from rae_xla.models.encoders import DINOv3Encoder, HFVisionEncoder

torch_xla = pytest.importorskip("torch_xla")
pytestmark = pytest.mark.xla


@torch.no_grad()
def same_on_xla(encoder, images):
    from torch_xla.debug import metrics

    expected = copy.deepcopy(encoder)(images)
    device = torch_xla.device()
    encoder, images = encoder.to(device), images.to(device)
    torch_xla.sync()
    metrics.clear_all()
    actual = encoder(images)
    torch_xla.sync()
    fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::")]
    assert fallbacks == []
    torch.testing.assert_close(actual.cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_generic_encoder(name, tmp_path):
    model = save_model(name, tmp_path)
    side = model.config.image_size + 16  # its positions are resampled when it is built
    encoder = HFVisionEncoder(str(tmp_path), input_size=side, layers=[0, 2], token_mean=True)
    same_on_xla(encoder, torch.randn(2, 3, side, side))


def test_dinov3():
    folder = str(GOLDEN / "raev2/encoders/dinov3")
    encoder = DINOv3Encoder(folder, input_size=64, layers=[1, 3, 5], token_mean=True)
    same_on_xla(encoder, torch.randn(2, 3, 64, 64))
