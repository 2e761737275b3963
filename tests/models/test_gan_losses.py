"""Adversarial losses against golden values."""

from __future__ import annotations

import pytest
import torch
from golden_case import load_case
from torch.nn import functional as F

from rae_xla.models.gan_losses import DISCRIMINATOR_LOSSES, adaptive_weight, vanilla_g

LOSSES = load_case("disc/gan_losses")
BALANCE = load_case("disc/adaptive_weight")
ROWS = [pytest.param(row, id=f"row{row['i']}") for row in BALANCE.meta["rows"]]


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_discriminator_losses(name: str) -> None:
    loss = DISCRIMINATOR_LOSSES[name](LOSSES["in.logits_real"], LOSSES["in.logits_fake"])
    assert loss.shape == ()
    assert loss.item() == pytest.approx(LOSSES[f"out.{name}_d.mean"].item(), rel=1e-6)


def test_generator_loss() -> None:
    loss = vanilla_g(LOSSES["in.logits_fake"])
    assert loss.item() == pytest.approx(LOSSES["out.vanilla_g.mean"].item(), rel=1e-6)


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_bfloat16_logits_give_float32_loss(name: str) -> None:
    real, fake = (LOSSES[f"in.logits_{kind}"].bfloat16() for kind in ("real", "fake"))
    loss = DISCRIMINATOR_LOSSES[name](real, fake)
    assert loss.dtype == torch.float32
    assert loss.item() == DISCRIMINATOR_LOSSES[name](real.float(), fake.float()).item()
    assert vanilla_g(fake).dtype == torch.float32


def gradients(row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients of the recorded toy losses w.r.t. the last weight."""
    weight = BALANCE["in.weight"].clone().requires_grad_()
    out = F.linear(BALANCE["in.h"], weight, BALANCE["in.bias"])
    recon = (out - BALANCE["in.target"]).abs().mean()
    gan = -row["gan_scale"] * out.tanh().mean()
    (recon_grad,) = torch.autograd.grad(recon, weight, retain_graph=True)
    (gan_grad,) = torch.autograd.grad(gan, weight)
    return recon_grad, gan_grad


@pytest.mark.parametrize("row", ROWS)
def test_adaptive_weight(row: dict) -> None:
    recon, gan = gradients(row)
    assert recon.norm().item() == pytest.approx(row["recon_grad_norm"], rel=1e-6)
    assert gan.norm().item() == pytest.approx(row["gan_grad_norm"], rel=1e-5, abs=1e-12)
    weight = adaptive_weight(recon.requires_grad_(), gan.requires_grad_(), row["max_d_weight"])
    assert weight.item() == pytest.approx(row["weight"], rel=1e-5)
    assert weight.shape == ()
    assert not weight.requires_grad
