"""AdamW as one function of tensors, designed to be traced.

On XLA the host traces every operation of every step while the devices compute.
``torch.optim.AdamW`` traces about twelve operations per parameter, three of them through shape
functions in Python: 59 ms for 90 parameters, which scales to more than a TPU needs to compute the
382 of DiT-DH-XL. The same arithmetic in ``torch._foreach`` operations costs a fifth of that
(``benchmarks/optimizer_trace.py``), and few kernel launches on CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rae_xla.config import OptimizerConfig


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), as in torch.optim.

    Attributes:
        betas: decay rates of the first and second moment.
        eps: added to the square root of the second moment.
        weight_decay: applied to every parameter, multiplied by the learning rate.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @classmethod
    def from_config(cls, settings: OptimizerConfig) -> AdamW:
        """Build the optimizer that an ``optimizer`` section describes."""
        return cls(settings.betas, settings.eps, settings.weight_decay)

    @torch.no_grad()
    def update(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        lr: Tensor,
        step: Tensor,
        where: Tensor,
    ) -> None:
        """Update parameters and moments in place.

        Args:
            parameters: the trained parameters.
            gradients: one for each parameter.
            first: first moments, zeros before the first step.
            second: second moments, zeros before the first step.
            lr: 0-d, the learning rate of this step.
            step: 0-d, the number of earlier steps.
            where: 0-d bool; False leaves parameters and moments unchanged, even if gradients are
                not finite.
        """
        beta1, beta2 = self.betas
        count = step.to(torch.float32) + 1
        # sqrt(second / bias2) + eps; bias1 and the learning rate are one factor.
        root_bias2 = torch.sqrt(1 - beta2**count)
        lr = torch.where(where, lr, 0.0)
        rate = lr / (1 - beta1**count)
        # A step is skipped through its factors, which needs no second copy of the state.
        gradients = [torch.where(where, gradient, 0.0) for gradient in gradients]
        torch._foreach_mul_(first, torch.where(where, beta1, 1.0))
        torch._foreach_add_(first, gradients, alpha=1 - beta1)
        torch._foreach_mul_(second, torch.where(where, beta2, 1.0))
        torch._foreach_add_(second, torch._foreach_mul(gradients, gradients), alpha=1 - beta2)
        scale = torch._foreach_sqrt(second)
        torch._foreach_div_(scale, root_bias2)
        torch._foreach_add_(scale, self.eps)
        changes = torch._foreach_div(first, scale)
        torch._foreach_mul_(changes, rate)
        if self.weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
        torch._foreach_sub_(parameters, changes)
