"""LPIPS: golden values, properties, weight files and errors."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from gan_cases import build_lpips, load_disc_case
from golden_case import load_case
from torch import Tensor

from rae_xla.errors import UserError
from rae_xla.models import lpips as module
from rae_xla.models.lpips import LPIPS, load_lpips

pytestmark = pytest.mark.slow

CASE = load_disc_case("lpips_random_vgg")


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return build_lpips()


# ----- golden values


def test_distance(lpips: LPIPS) -> None:
    actual = lpips(CASE["in.a"], CASE["in.b"])
    assert actual.shape == (2,)
    torch.testing.assert_close(actual, CASE["out.none"].flatten(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actual.mean(), CASE["out.mean"][0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actual.sum(), CASE["out.sum"][0], atol=1e-6, rtol=1e-5)
    assert torch.equal(lpips(CASE["in.a"], CASE["in.a"]), torch.zeros(2))


def test_gradient(lpips: LPIPS) -> None:
    images = CASE["in.a"].clone().requires_grad_()
    lpips(images, CASE["in.b"]).mean().backward()
    expected = CASE["grad.a"]
    assert (images.grad - expected).norm() < 1e-5 * expected.norm()
    assert all(p.grad is None and not p.requires_grad for p in lpips.parameters())


def test_feature_maps(lpips: LPIPS) -> None:
    maps = lpips.net(lpips.scaling_layer(CASE["in.a"]))
    recorded = CASE.meta["features"]
    assert [list(x.shape) for x in maps] == [x["shape"] for x in recorded.values()]
    for actual, expected in zip(maps, recorded.values(), strict=True):
        assert actual.mean().item() == pytest.approx(expected["mean"], rel=1e-5)
        assert actual.std().item() == pytest.approx(expected["std"], rel=1e-5)


def test_keys_and_constants(lpips: LPIPS) -> None:
    assert list(lpips.state_dict()) == CASE.meta["state_keys"]
    assert torch.equal(lpips.scaling_layer.shift, CASE["const.shift"])
    assert torch.equal(lpips.scaling_layer.scale, CASE["const.scale"])


@pytest.mark.parametrize("case", ["disc/lpips_random_vgg", "train/stage1_one_step"])
def test_weights_match_recipe(case: str) -> None:
    meta = load_case(case).meta
    seed = meta.get("base_seed", meta.get("lpips_base_seed"))
    state = build_lpips(seed).state_dict()
    sums = meta.get("lpips_weight_sums") or {k: v["sum"] for k, v in meta["weights"].items()}
    actual = {key: state[key].double().sum().item() for key in sums}
    assert actual == pytest.approx(sums, rel=1e-5, abs=1e-3)


# ----- properties


def test_features_can_be_reused(lpips: LPIPS) -> None:
    with torch.no_grad():
        a, b = lpips.features(CASE["in.a"]), lpips.features(CASE["in.b"])
    assert all(maps.dtype == torch.float32 for maps in a)
    assert torch.equal(lpips.distance(a, b), lpips(CASE["in.a"], CASE["in.b"]))
    for maps in a:
        lengths = maps.norm(dim=1)
        assert ((lengths - 1).abs().lt(1e-5) | (lengths == 0)).all()


def test_train_mode_equals_eval_mode(lpips: LPIPS) -> None:
    expected = lpips(CASE["in.a"], CASE["in.b"])
    assert torch.equal(lpips.train()(CASE["in.a"], CASE["in.b"]), expected)
    lpips.eval()


def test_only_convolutions_lose_precision_under_autocast(lpips: LPIPS) -> None:
    a, b = CASE["in.a"], CASE["in.b"]
    exact = lpips.features(a), lpips.features(b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(maps.dtype == torch.float32 for maps in lpips.features(a))
        actual = lpips.distance(*exact)
        rough = lpips(a, b)
    assert torch.equal(actual, lpips.distance(*exact))
    assert actual.dtype == rough.dtype == torch.float32
    torch.testing.assert_close(rough, actual, atol=0, rtol=0.02)


def test_non_square_images(lpips: LPIPS) -> None:
    assert lpips(torch.rand(1, 3, 20, 48), torch.rand(1, 3, 20, 48)).isfinite().all()


# ----- features that are zero in every channel


def naive_normalisation(maps: Tensor) -> Tensor:
    return maps / (maps.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-12])
def test_channel_normalisation_has_finite_gradients(scale: float) -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 3, 3).relu() * scale
    maps[0, :, 1, 1] = 0
    actual, naive = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    weight = torch.randn(2, 4, 3, 3)
    assert torch.equal(module._normalise_channels(actual), naive_normalisation(naive))
    (module._normalise_channels(actual) * weight).sum().backward()
    (naive_normalisation(naive) * weight).sum().backward()
    assert naive.grad[0, :, 1, 1].isnan().all()  # what this is about
    assert torch.equal(actual.grad[0, :, 1, 1], torch.zeros(4))
    rest = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    rest[0, :, 1, 1] = False
    rest = rest & (maps.sum(dim=1, keepdim=True) > 0)
    assert torch.equal(actual.grad[rest.expand_as(maps)], naive.grad[rest.expand_as(maps)])
    assert actual.grad.isfinite().all()


def test_image_without_activations_has_finite_gradient() -> None:
    blind = build_lpips()
    for part in blind.net.children():
        for layer in part:
            if isinstance(layer, torch.nn.Conv2d):
                layer.bias.fill_(-1000.0)
    images = CASE["in.a"].clone().requires_grad_()
    distance = blind(images, CASE["in.b"])
    distance.mean().backward()
    assert torch.equal(distance, torch.zeros(2))
    assert torch.equal(images.grad, torch.zeros_like(images))


# ----- weight files


def torchvision_layout(lpips: LPIPS) -> dict[str, Tensor]:
    state, actual = lpips.state_dict(), {}
    for key, published_key in zip(
        CASE.meta["state_keys"], CASE.meta["eval_variant_state_keys"], strict=True
    ):
        if published_key.startswith("net."):
            actual["features." + published_key.split(".", 2)[2]] = state[key]
    return actual


@pytest.fixture(scope="module")
def files(lpips: LPIPS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lpips")
    state = lpips.state_dict()
    vgg = torchvision_layout(lpips) | {"classifier.0.weight": torch.zeros(2)}
    torch.save(vgg, folder / "vgg.pth")
    torch.save(state, folder / "lpips.pth")
    package_state = zip(CASE.meta["eval_variant_state_keys"], state.values(), strict=True)
    torch.save(dict(package_state), folder / "package.pth")
    linear = {key: value for key, value in state.items() if key.startswith("lin")}
    torch.save(linear, folder / "linear.pth")
    return folder


@pytest.mark.parametrize(
    ("vgg", "linear"),
    [("vgg.pth", "linear.pth"), ("lpips.pth", None), ("package.pth", None)],
)
def test_local_files(lpips: LPIPS, files: Path, vgg: str, linear: str | None) -> None:
    actual = load_lpips(str(files / vgg), linear and str(files / linear))
    for key, value in lpips.state_dict().items():
        assert torch.equal(actual.state_dict()[key], value)
    assert not any(p.requires_grad for p in actual.parameters())


def test_linear_layers_of_installed_package(files: Path) -> None:
    imported = "lpips" in sys.modules
    actual = load_lpips(str(files / "vgg.pth"), None)
    assert ("lpips" in sys.modules) == imported  # its file was read, not its code
    spec = importlib.util.find_spec("lpips")
    published = torch.load(
        Path(spec.origin).parent / "weights/v0.1/vgg.pth", weights_only=True, map_location="cpu"
    )
    for key, value in published.items():
        assert torch.equal(actual.state_dict()[key], value)


def test_vgg_from_torchvision(lpips: LPIPS, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = {}

    def download(url: str, **arguments: object) -> dict[str, Tensor]:
        request.update(url=url, **arguments)
        return torch.load(files / "vgg.pth", weights_only=True)

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    actual = load_lpips(None, str(files / "linear.pth"))
    assert "vgg16" in request["url"]
    assert request["check_hash"] is True
    torch.testing.assert_close(
        actual(CASE["in.a"], CASE["in.b"]), lpips(CASE["in.a"], CASE["in.b"])
    )


def test_failed_vgg_download_raises_user_error(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import VGG16_Weights

    def unreachable(url: str, **_: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError) as caught:
        load_lpips(None, str(files / "linear.pth"))
    message = str(caught.value)
    for part in (
        "VGG16",
        VGG16_Weights.IMAGENET1K_V1.url,
        "no route to host",
        "weights.vgg16=FILE",
        "gan.loss.perceptual_weight=0",
    ):
        assert part in message
    assert "\n" not in message


def test_missing_local_files_raise_user_errors(files: Path) -> None:
    from torchvision.models import VGG16_Weights

    for arguments, parts in (
        (
            ("no/vgg.pth", None),
            ["no/vgg.pth does not exist", VGG16_Weights.IMAGENET1K_V1.url, "vgg16"],
        ),
        (
            (str(files / "vgg.pth"), "no/lin.pth"),
            ["no/lin.pth does not exist", "lpips package", "lpips"],
        ),
    ):
        with pytest.raises(UserError) as caught:
            load_lpips(*arguments)
        message = str(caught.value)
        for part in (*parts[:2], f"weights.{parts[2]}=FILE", "gan.loss.perceptual_weight=0"):
            assert part in message


def test_missing_lpips_package_raises_user_error(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install lpips.*weights\.lpips=FILE.*weight=0"):
        load_lpips(str(files / "vgg.pth"), None)


def test_mismatched_files_raise(files: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"weights\.vgg16: .*linear\.pth .*missing slice1\.0"):
        load_lpips(str(files / "linear.pth"), None)
    with pytest.raises(UserError, match=r"weights\.lpips: .*vgg\.pth .*missing model\.1\.weight"):
        load_lpips(str(files / "vgg.pth"), str(files / "vgg.pth"))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"weights\.vgg16: .*list\.pth is not a state dict"):
        load_lpips(str(tmp_path / "list.pth"), None)
