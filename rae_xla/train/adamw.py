"""AdamW as one function of tensors, made to be traced.

On XLA every operation of a step is recorded anew each time, on the host, while the devices compute.
``torch.optim.AdamW`` records some twelve operations for each parameter, three of them through shape
functions written in Python: 59 ms for 90 parameters, and in proportion longer than a TPU computes
for the 382 of DiT-DH-XL. The same arithmetic in list operations costs a fifth of that
(``benchmarks/optimizer_trace.py``), and on CUDA each of them is few kernels.
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
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: on every parameter, times the learning rate.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @classmethod
    def of(cls, settings: OptimizerConfig) -> AdamW:
        """The optimizer a section of the configuration describes."""
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
            parameters: what is trained.
            gradients: their gradients.
            first: their first moments, zeros at first.
            second: their second moments, zeros at first.
            lr: 0-d, the learning rate of this step.
            step: 0-d, how many steps were taken before.
            where: 0-d bool; false leaves parameters and moments as they are, whatever the
                gradients hold.
        """
        beta1, beta2 = self.betas
        count = step.to(torch.float32) + 1
        # sqrt(second / bias2) + eps, with bias1 and the rate taken into one factor
        root_bias2 = torch.sqrt(1 - beta2**count)
        lr = torch.where(where, lr, 0.0)
        rate = lr / (1 - beta1**count)
        # A step is left out by what it multiplies with: no second copy of the state is made.
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
