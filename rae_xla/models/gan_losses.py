"""Losses between a discriminator and what it judges, and how they are balanced.

Every loss is a float32 scalar: the mean over all logits of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Keeps the balance finite where the adversarial gradient vanishes (VQGAN, equation 7).
BALANCE_EPS = 1e-6


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator (Lim & Ye 2017) from logits of any shape."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def vanilla_d(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy loss of the discriminator (Goodfellow et al. 2014) from logits of any shape."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def vanilla_g(fake: Tensor) -> Tensor:
    """Loss of the generator: the negated mean logit. The published name; it goes with both."""
    return -fake.float().mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_d,
    "vanilla": vanilla_d,
}
"""``loss(real, fake)`` by the name in ``gan.loss.disc_loss``."""


@torch.no_grad()
def adaptive_weight(recon_grad: Tensor, gan_grad: Tensor, max_weight: float) -> Tensor:
    """Weight of the adversarial loss that matches its gradient to that of reconstruction.

    The ratio of the two Frobenius norms, in [0, ``max_weight``] (VQGAN, Esser et al. 2021,
    equation 7).

    Args:
        recon_grad: gradient of the reconstruction losses w.r.t. the decoder's last weight.
        gan_grad: gradient of the adversarial loss w.r.t. the same weight.
        max_weight: upper bound, 1e4 as published.
    """
    recon, gan = recon_grad.float().square().sum().sqrt(), gan_grad.float().square().sum().sqrt()
    return (recon / (gan + BALANCE_EPS)).clamp(0.0, max_weight)
