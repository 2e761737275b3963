"""Inception equals torch-fidelity's, with RANDOM weights in its file format."""

import urllib.error

import pytest
import torch
from random_networks import random_extractor, write_inception

from rae_xla.errors import UserError
from rae_xla.evaluate.inception import (
    CLASSES,
    FEATURES,
    SPATIAL_FEATURES,
    load_inception,
    resize_like_tensorflow1,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


def random_images(height, width, count=2):
    generator = torch.Generator().manual_seed(height)
    return torch.randint(256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (40, 64), (299, 299), (512, 512)])
def test_resize_is_bit_identical(size):
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x,
    )

    images = random_images(*size).float()
    expected = interpolate_bilinear_2d_like_tensorflow1x(images, (299, 299), align_corners=False)
    assert torch.equal(resize_like_tensorflow1(images, 299), expected)


def test_features_equal_those_of_torch_fidelity(weights):
    network = load_inception(str(weights))
    images = random_images(32, 32)
    published = random_extractor(features=("2048", "logits_unbiased"))
    published.Mixed_6d.branch1x1.register_forward_hook(lambda *call: maps.append(call[2]))
    maps: list[torch.Tensor] = []
    pool, logits = published(images)
    features = network(images)
    assert {name: rows.shape[1] for name, rows in features.items()} == {
        "pool": FEATURES, "spatial": SPATIAL_FEATURES, "logits": CLASSES,
    }  # fmt: skip
    assert torch.equal(features["pool"], pool)
    torch.testing.assert_close(features["logits"], logits, rtol=1e-5, atol=1e-5)
    # seven channels of mixed_6/conv, the channel last
    assert maps[0].shape[2:] == (17, 17)
    assert torch.equal(features["spatial"].view(2, 17, 17, 7), maps[0][:, :7].permute(0, 2, 3, 1))
    # random weights must not make the features constant
    assert pool.std() > 0.01
    assert maps[0][:, :7].std() > 0.01
    assert network.source == str(weights)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_wrong_weight_files(tmp_path):
    with pytest.raises(UserError, match=r"weights\.inception.*none\.pth"):
        load_inception(str(tmp_path / "none.pth"))
    other = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(2)}, other)
    with pytest.raises(UserError, match=r"weights\.inception.*other\.pth.*https://.*\.pth"):
        load_inception(str(other))
    text = tmp_path / "text.pth"
    text.write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth"):
        load_inception(str(text))


def test_failed_download(monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as published

    def unreachable(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(published, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError) as caught:
        load_inception(None)
    message = str(caught.value)
    for part in (
        published.URL_INCEPTION_V3,
        "no route to host",
        "weights.inception=FILE",
        "--metrics psnr ssim lpips",
    ):
        assert part in message
