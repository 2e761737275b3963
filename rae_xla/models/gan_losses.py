"""Adversarial losses of generator and discriminator, and the weight that balances them.

Every loss is a float32 scalar, the mean over all logits of the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Added to the norm of the adversarial gradient, which may be zero (VQGAN, equation 7).
BALANCE_EPS = 1e-6


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim & Ye 2017) for logits of any shape."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def vanilla_d(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's cross-entropy loss (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


def vanilla_g(fake: Tensor) -> Tensor:
    """Return the generator's loss, the negated mean logit.

    The name is the published one; this loss is used with both discriminator losses.
    """
    return -fake.float().mean()


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_d,
    "vanilla": vanilla_d,
}
"""Discriminator losses ``loss(real, fake)`` by their name in ``gan.loss.disc_loss``."""


@torch.no_grad()
def adaptive_weight(recon_grad: Tensor, gan_grad: Tensor, max_weight: float) -> Tensor:
    """Return the weight that scales the adversarial gradient to the reconstruction gradient.

    This is the ratio of the two gradients' Frobenius norms (VQGAN, Esser et al. 2021, equation 7).

    Args:
        recon_grad: gradient of the reconstruction losses w.r.t. the decoder's last weight.
        gan_grad: gradient of the adversarial loss w.r.t. the same weight.
        max_weight: upper bound of the result, 1e4 as published.

    Returns:
        A scalar in [0, ``max_weight``].
    """
    recon, gan = recon_grad.float().square().sum().sqrt(), gan_grad.float().square().sum().sqrt()
    return (recon / (gan + BALANCE_EPS)).clamp(0.0, max_weight)
