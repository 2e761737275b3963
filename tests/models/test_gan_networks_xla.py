"""Networks of the stage 1 losses on XLA: CPU results, without fallback to the host."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from gan_cases import build_discriminator, build_lpips, load_disc_case
from torch import Tensor

from rae_xla.models.diffaug import diff_augment
from rae_xla.models.dino_vit import DINOViT, DINOViTConfig
from rae_xla.models.discriminator import DinoDiscriminator
from rae_xla.models.gan_losses import DISCRIMINATOR_LOSSES, adaptive_weight, vanilla_g
from rae_xla.models.lpips import LPIPS

torch_xla = pytest.importorskip("torch_xla")
pytestmark = pytest.mark.xla


def on_xla(compute: Callable[[torch.device], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the results of ``compute`` on the XLA device; assert that no op falls back."""
    from torch_xla.debug import metrics

    # Before any backward pass, because autograd counts the devices once per process.
    device = torch_xla.device()
    metrics.clear_all()
    actual = compute(device)
    torch_xla.sync()
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []
    return {key: value.detach().cpu() for key, value in actual.items()}


def leaf(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device, copy=True).requires_grad_()


def check(compute: Callable[[torch.device], dict[str, Tensor]], *, relative: float) -> None:
    """Compare XLA with the CPU, with tolerance ``relative`` times the largest value."""
    actual = on_xla(compute)
    expected = compute(torch.device("cpu"))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        bound = relative * max(value.abs().max().item(), 1e-6)
        torch.testing.assert_close(actual[key], value.detach(), atol=bound, rtol=0)


@pytest.mark.parametrize("blind", [False, True], ids=["", "no features"])
def test_lpips(blind: bool) -> None:
    case, lpips = load_disc_case("lpips_random_vgg"), build_lpips()
    if blind:  # every feature vector is 0
        for name, parameter in lpips.net.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(-1000.0)

    def compute(device: torch.device) -> dict[str, Tensor]:
        network: LPIPS = copy.deepcopy(lpips).to(device)
        # In `a` two pixels of one max-pool window are equal up to rounding: there PyTorch's float32
        # gradient differs from its float64 gradient by 1e-3 (XLA's by 3e-6). `b` has no such pair.
        images = leaf(case["in.b"], device)
        distance = network(images, case["in.a"].to(device))
        distance.mean().backward()
        assert images.grad is not None
        return {"distance": distance, "gradient": images.grad}

    check(compute, relative=1e-4)


def test_discriminator_step() -> None:
    """The discriminator's gradients, and its updated singular vectors."""
    case, disc = load_disc_case("dinodisc_a"), build_discriminator("dinodisc_a").train()

    def compute(device: torch.device) -> dict[str, Tensor]:
        network: DinoDiscriminator = copy.deepcopy(disc).to(device)
        network.backbone.to(device)
        with torch.no_grad():
            features = [
                network.features(case[f"in.{kind}"].to(device)) for kind in ("fake", "real")
            ]
        fake, real = (network.heads_forward(taps) for taps in features)
        loss = DISCRIMINATOR_LOSSES["hinge"](real, fake)
        loss.backward()
        # The gradient of a bias that a norm removes is zero up to rounding.
        gradients = {
            key: parameter.grad
            for key, parameter in network.named_parameters()
            if parameter.grad is not None and case.meta["grad_norms"][key] > 1e-6
        }
        vectors = dict(network.named_buffers())
        return {"loss": loss, "fake": fake, "real": real} | gradients | vectors

    check(compute, relative=1e-4)


def test_heads_with_group_norm() -> None:
    disc = build_discriminator("dinodisc_b_gn")
    width = disc.backbone.config.embed_dim
    tokens = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))

    def compute(device: torch.device) -> dict[str, Tensor]:
        head = copy.deepcopy(disc.heads[0]).to(device)
        features = leaf(tokens, device)
        logits = head(features.transpose(1, 2))
        logits.square().mean().backward()
        assert features.grad is not None
        return {"logits": logits, "gradient": features.grad}

    check(compute, relative=1e-4)


def test_generator_loss() -> None:
    """The decoder's gradient through augmentation and the discriminator in eval mode."""
    # A narrow backbone with small patches: without XLA's optimisations, which test runs disable,
    # the gradient of the patch embedding's convolution is a plain loop, and the recorded backbone's
    # takes minutes.
    torch.manual_seed(0)
    backbone = DINOViT(DINOViTConfig(depth=2, embed_dim=8, num_heads=2, patch_size=8))
    disc = DinoDiscriminator(backbone).eval()
    fake = load_disc_case("dinodisc_a")["in.fake"][:2]
    flags, draws = torch.rand(3), torch.rand(len(fake), 7)

    def compute(device: torch.device) -> dict[str, Tensor]:
        network: DinoDiscriminator = copy.deepcopy(disc).to(device)
        network.backbone.to(device)
        images = leaf(fake, device)
        seen = diff_augment(images, flags.to(device), draws.to(device), prob=1.0, cutout=0.2)
        loss = vanilla_g(network(seen))
        (gradient,) = torch.autograd.grad(loss, images)
        weight = adaptive_weight(torch.ones_like(gradient), gradient, 1e4)
        return {"seen": seen, "loss": loss, "gradient": gradient, "weight": weight}

    check(compute, relative=1e-4)


@pytest.mark.parametrize("key", ["0.0", "3.1"])
def test_diff_augment(key: str) -> None:
    case = load_disc_case("diffaug")
    row = next(row for row in case.meta["rows"] if row["key"] == key)

    def compute(device: torch.device) -> dict[str, Tensor]:
        images = leaf(case["in.x"], device)
        flags = case[f"in.rand3.{key}"].to(device)
        draws = case[f"in.rand7.{key}"].flatten(1).T.to(device)
        actual = diff_augment(images, flags, draws, prob=row["prob"], cutout=row["cutout"])
        (actual * case["in.grad_weight"].to(device)).sum().backward()
        assert images.grad is not None
        return {"images": actual, "gradient": images.grad}

    check(compute, relative=1e-6)


def test_other_random_numbers_do_not_recompile() -> None:
    from torch_xla.debug import metrics

    device = torch_xla.device()
    images = load_disc_case("diffaug")["in.x"].to(device)

    def augment(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        flags, draws = torch.rand(3, generator=generator), torch.rand(4, 7, generator=generator)
        diff_augment(images, flags.to(device), draws.to(device), prob=0.5, cutout=0.3)
        torch_xla.sync()

    augment(0)
    compiled = metrics.metric_data("CompileTime")
    augment(1)
    assert metrics.metric_data("CompileTime")[0] == compiled[0]
