"""Discriminator: golden values, published keys, its layers and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from gan_cases import DISCRIMINATORS, build_backbone, build_discriminator, load_disc_case
from golden_case import Case, load_case
from torch import Tensor, nn

from rae_xla.errors import UserError
from rae_xla.models.dino_vit import RECIPES, DINOViT, DINOViTConfig
from rae_xla.models.discriminator import (
    BatchNormLocal,
    CircularConv1d,
    DinoDiscriminator,
    GroupNormFloat,
    SpectralConv1d,
)
from rae_xla.models.gan_losses import hinge_d, vanilla_g

pytestmark = pytest.mark.slow

KEYMAPS = ("S_8_ks9", "S_16_ks3", "B_16_ks3")


@pytest.fixture(params=DISCRIMINATORS)
def golden(request) -> tuple[Case, DinoDiscriminator]:
    return load_disc_case(request.param), build_discriminator(request.param)


def logits_close(actual: Tensor, expected: Tensor) -> None:
    """Compare relative to the largest logit: norms of almost constant channels amplify rounding."""
    assert actual.dtype == torch.float32
    bound = 2e-6 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, atol=bound, rtol=0)


def tiny_backbone(width: int = 32) -> DINOViT:
    return DINOViT(DINOViTConfig(depth=2, embed_dim=width, num_heads=4, patch_size=56))


# ----- golden values


def test_eval_mode(golden) -> None:
    case, disc = golden
    disc.eval()
    before = copy.deepcopy(disc.state_dict())
    for kind in ("fake", "real"):
        logits_close(disc(case[f"in.{kind}"]), case[f"out.eval_{kind}"])
    for key, value in disc.state_dict().items():
        assert torch.equal(value, before[key])


def test_gradient_of_generator(golden) -> None:
    case, disc = golden
    disc.eval()
    images = case["in.fake"].clone().requires_grad_()
    loss = vanilla_g(disc(images))
    assert loss.item() == pytest.approx(case.meta["g_loss_eval"], rel=1e-5)
    loss.backward()
    expected = case["grad.fake_eval"]
    assert (images.grad - expected).norm() < 1e-5 * expected.norm()


def test_train_step(golden) -> None:
    case, disc = golden
    disc.train()
    fake, real = disc(case["in.fake"]), disc(case["in.real"])  # in this order, as recorded
    logits_close(fake, case["out.train_fake"])
    logits_close(real, case["out.train_real"])
    after = case.under("after_train_forward")
    state = disc.state_dict()
    assert set(after) == {key for key in state if key.endswith(("weight_u", "weight_v"))}
    for key, value in after.items():
        torch.testing.assert_close(state[key], value, atol=1e-6, rtol=1e-5)

    loss = hinge_d(real, fake)
    assert loss.item() == pytest.approx(case.meta["hinge_d_loss_train"], rel=1e-6)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in disc.named_parameters()}
    # The gradient of a bias before a norm over the same channel is zero up to rounding.
    noise = 3e-7 * case.meta["grad_total_norm"]
    norms = {key: value.norm().item() for key, value in gradients.items()}
    assert norms == pytest.approx(case.meta["grad_norms"], rel=1e-4, abs=noise)
    total = torch.stack([value.norm() for value in gradients.values()]).norm().item()
    assert total == pytest.approx(case.meta["grad_total_norm"], rel=1e-5)
    for key, value in case.under("grad").items():
        if key in gradients:
            assert (gradients[key] - value).norm() < max(1e-4 * value.norm(), noise)


def test_features_then_heads_equals_forward(golden) -> None:
    case, disc = golden
    disc.eval()
    with torch.no_grad():
        features = disc.features(case["in.real"])
    logits = disc.heads_forward(features)
    assert torch.equal(logits, disc(case["in.real"]))
    assert logits.requires_grad


def test_sample_is_independent_of_batch(golden) -> None:
    case, disc = golden
    disc.eval()
    logits_close(disc(case["in.fake"][1:2]), case["out.eval_fake"][1:2])


# ----- state dicts


@pytest.mark.parametrize("name", KEYMAPS)
def test_keys_and_shapes_match_published_files(name: str) -> None:
    meta = load_case(f"keymaps/discriminator_{name}").meta
    config = dict(meta["config"])
    with torch.device("meta"):
        disc = DinoDiscriminator(DINOViT(RECIPES[config.pop("recipe")]), **config)
    keys = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in disc.state_dict().items()
    }
    assert keys == meta["keys"]
    assert list(keys) == list(meta["keys"])
    assert [name for name, _ in disc.named_buffers()] == meta["persistent_buffers"]
    trained = sum(p.numel() for p in disc.parameters() if p.requires_grad)
    assert trained == meta["n_params"] == meta["n_params_requires_grad_by_default"]
    logits = disc(torch.empty(2, 3, 64, 64, device="meta"))
    assert logits.shape == (2, 5 * disc.backbone.config.num_tokens)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_key_order_matches_published_files(name: str) -> None:
    assert list(build_discriminator(name).state_dict()) == load_disc_case(name).meta["state_keys"]


def test_backbone_is_not_a_submodule() -> None:
    backbone = tiny_backbone()
    disc = DinoDiscriminator(backbone)
    assert disc.backbone is backbone
    assert all(key.startswith("heads.") for key in disc.state_dict())
    assert backbone not in list(disc.modules())
    disc.double().requires_grad_(True)
    assert backbone.pos_embed.dtype == torch.float32
    assert not backbone.pos_embed.requires_grad
    assert copy.deepcopy(disc).backbone is not backbone


def test_default_key_depths_of_shallow_backbone() -> None:
    disc = DinoDiscriminator(tiny_backbone(), ks=3)  # of (2, 5, 8, 11) none is below 2
    assert len(disc.heads) == 1
    assert disc(torch.rand(2, 3, 32, 32)).shape == (2, 16)


# ----- layers


def test_circular_convolution_equals_pytorch() -> None:
    conv = CircularConv1d(4, 6, 5)
    reference = nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular")
    reference.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, 11)
    torch.testing.assert_close(conv(x), reference(x))


def test_spectral_convolution_equals_pytorch_spectral_norm() -> None:
    torch.manual_seed(0)
    conv = SpectralConv1d(4, 6, 3)
    plain = nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular")
    reference = torch.nn.utils.spectral_norm(plain)
    reference.load_state_dict(conv.state_dict())
    assert isinstance(conv, nn.Conv1d)
    x = torch.randn(2, 4, 11)
    for mode in (True, True, False):
        actual, expected = conv.train(mode)(x), reference.train(mode)(x)
        torch.testing.assert_close(actual, expected)
        actual.square().sum().backward()
        expected.square().sum().backward()
    torch.testing.assert_close(
        conv.weight_orig.grad, reference.weight_orig.grad, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(conv.weight_u, reference.weight_u)
    torch.testing.assert_close(conv.weight_v, reference.weight_v)


def test_untrained_spectral_convolution_is_normalised() -> None:
    torch.manual_seed(0)
    conv = SpectralConv1d(8, 8, 3).eval()
    with torch.device("meta"):
        late = SpectralConv1d(8, 8, 3)
    late.to_empty(device="cpu").reset_parameters()
    for module in (conv, late):
        matrix = module.weight_orig.flatten(1)
        sigma = module.weight_u @ matrix @ module.weight_v
        assert sigma.item() == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=0.05)


def test_two_train_forwards_before_backward() -> None:
    disc = DinoDiscriminator(tiny_backbone(), ks=3).train()
    first, second = disc(torch.rand(2, 3, 32, 32)), disc(torch.rand(2, 3, 32, 32))
    (first.sum() + second.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in disc.parameters())


@pytest.mark.parametrize("norm", [BatchNormLocal(32), GroupNormFloat(32)])
def test_norms_are_float32_under_autocast(norm: nn.Module) -> None:
    x = torch.randn(2, 32, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = norm(x)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, norm(x.float()))


def test_batch_norm_of_one_sample() -> None:
    norm = BatchNormLocal(5)
    x = torch.randn(3, 5, 20) * 4 + 2
    expected = nn.functional.instance_norm(x, eps=1e-6)
    torch.testing.assert_close(norm(x), expected)


def test_norm_of_constant_channel_is_finite() -> None:
    x = torch.full((1, 5, 20), 3.0, requires_grad=True)
    actual = BatchNormLocal(5)(x)
    actual.sum().backward()
    assert torch.equal(actual, torch.zeros_like(actual))
    assert x.grad.isfinite().all()


def test_spectral_vectors_are_float32_under_autocast() -> None:
    case = load_disc_case("dinodisc_a")
    disc = build_discriminator("dinodisc_a").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = [disc(case["in.fake"]), disc(case["in.real"])]
    assert all(value.dtype == torch.float32 for value in logits)
    for key, value in case.under("after_train_forward").items():
        torch.testing.assert_close(disc.state_dict()[key], value, atol=1e-6, rtol=1e-5)
    expected = case["out.train_fake"]
    assert (logits[0] - expected).norm() < 0.05 * expected.norm()


def test_images_of_512_pixels() -> None:
    disc = DinoDiscriminator(build_backbone("dinodisc_a"), ks=3).eval()
    assert disc(torch.rand(1, 3, 512, 512) * 2 - 1).shape == (1, 2 * 196)


def test_compiles_without_graph_break() -> None:
    case, disc = load_disc_case("dinodisc_a"), build_discriminator("dinodisc_a").train()
    compiled = torch.compile(disc, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits_close(compiled(case["in.fake"]), case["out.train_fake"])
        logits_close(compiled(case["in.real"]), case["out.train_real"])


# ----- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "ln"}, "norm_type: unknown norm 'ln'; choose one of bn, gn"),
        ({"ks": 4}, "ks must be an odd kernel size of at most 33 tokens, got 4"),
        ({"ks": 35}, "ks must be an odd kernel size of at most 33 tokens, got 35"),
        ({"ks": -1}, "ks must be an odd kernel size"),
        ({"norm_type": "gn"}, "multiple of 32 channels, and the backbone has 48"),
    ],
)
def test_invalid_settings_raise(changes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DinoDiscriminator(tiny_backbone(48), **changes)
