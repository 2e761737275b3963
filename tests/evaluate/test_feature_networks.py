"""DINOv2 features equal those of transformers."""

import pytest
import torch
import torch.nn.functional as F
from golden_case import GOLDEN
from transformers import Dinov2WithRegistersModel

from rae_xla.errors import UserError
from rae_xla.evaluate.feature_networks import load_dino

FOLDER = str(GOLDEN / "rae/dinov2/encoder")


def test_dino_features_are_the_class_token_after_the_final_norm():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=generator)
    features = load_dino(FOLDER, "less")(pixels)["dino"]
    images = F.interpolate(pixels.float() / 255, (224, 224), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = Dinov2WithRegistersModel.from_pretrained(FOLDER).eval()
    with torch.no_grad():
        tokens = model((images - mean) / deviation).last_hidden_state
    assert features.shape == (2, 32)
    torch.testing.assert_close(features, tokens[:, 0], rtol=1e-4, atol=2e-5)
    assert not features.requires_grad


def test_missing_dino_folder():
    with pytest.raises(UserError, match=r"/none.*weights\.dinov2=FOLDER.*--metrics fid$"):
        load_dino("/none", "--metrics fid")
