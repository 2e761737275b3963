"""In-place updates of many tensors at once: AdamW, and the moving average of weights.

There are two implementations of each. ``adamw`` and ``average`` consist of elementary operations,
which a compiler fuses. Where operations run one by one, ``fused_adamw`` and ``interpolate`` read
and write every tensor once, without temporary copies: AdamW then needs 16 bytes a parameter in all,
for the parameter, its gradient and two moments, where the elementary operations need another 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.ops import dispatch
from rae_xla.ops.eager_random import runs_eagerly


@dataclass(frozen=True)
class AdamWSettings:
    """Constants of AdamW (Loshchilov and Hutter 2019), as in torch.optim.

    Attributes:
        betas: decay rates of the first and second moment.
        eps: added to the square root of the second moment.
        weight_decay: applied to every parameter, multiplied by the learning rate.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class AdamWTensors:
    """The tensors of an update, one of each kind for each parameter.

    Attributes:
        parameters: updated in place.
        gradients: may be overwritten.
        first: first moments, updated in place.
        second: second moments, updated in place.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


@dataclass(frozen=True)
class AdamWScalars:
    """What changes from update to update: 0-d tensors on the device of the parameters.

    Attributes:
        lr: the learning rate.
        step: the number of earlier updates.
        where: bool; False leaves parameters and moments unchanged, even if gradients are not
            finite.
        factor: multiplies the gradients; None for 1.
    """

    lr: Tensor
    step: Tensor
    where: Tensor
    factor: Tensor | None = None


@torch.no_grad()
def adamw_(settings: AdamWSettings, tensors: AdamWTensors, scalars: AdamWScalars) -> None:
    """Update parameters and moments in place."""
    device = scalars.lr.device.type
    if not dispatch.call("adamw_", device, settings, tensors, scalars):
        adamw(settings, tensors, scalars)


@torch.no_grad()
def average_(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Set every average to ``decay * average + (1 - decay) * value``, in place."""
    device = averages[0].device.type
    if not dispatch.call("average_", device, averages, values, decay):
        average(averages, values, decay)


def adamw(settings: AdamWSettings, tensors: AdamWTensors, scalars: AdamWScalars) -> None:
    """Update with elementary operations.

    On XLA the host traces every operation of every step while the devices compute.
    ``torch.optim.AdamW`` traces about twelve operations per parameter, three of them through shape
    functions in Python: 59 ms for 90 parameters, which scales to more than a TPU needs to compute
    the 382 of DiT-DH-XL. The same arithmetic in ``torch._foreach`` operations costs a fifth of that
    (``benchmarks/optimizer_trace.py``).
    """
    beta1, beta2 = settings.betas
    first, second, where = tensors.first, tensors.second, scalars.where
    gradients = tensors.gradients
    if scalars.factor is not None:
        gradients = list(torch._foreach_mul(gradients, scalars.factor))
    count = scalars.step.to(torch.float32) + 1
    # sqrt(second / bias2) + eps; bias1 and the learning rate are one factor.
    root_bias2 = torch.sqrt(1 - beta2**count)
    lr = torch.where(where, scalars.lr, 0.0)
    rate = lr / (1 - beta1**count)
    # A step is skipped through its factors, which needs no second copy of the state.
    gradients = [torch.where(where, gradient, 0.0) for gradient in gradients]
    torch._foreach_mul_(first, torch.where(where, beta1, 1.0))
    torch._foreach_add_(first, gradients, alpha=1 - beta1)
    torch._foreach_mul_(second, torch.where(where, beta2, 1.0))
    torch._foreach_add_(second, torch._foreach_mul(gradients, gradients), alpha=1 - beta2)
    scale = torch._foreach_sqrt(second)
    torch._foreach_div_(scale, root_bias2)
    torch._foreach_add_(scale, settings.eps)
    changes = torch._foreach_div(first, scale)
    torch._foreach_mul_(changes, rate)
    if settings.weight_decay:
        torch._foreach_mul_(tensors.parameters, 1 - lr * settings.weight_decay)
    torch._foreach_sub_(tensors.parameters, changes)


def fused_adamw(
    settings: AdamWSettings, tensors: AdamWTensors, scalars: AdamWScalars
) -> bool | None:
    """Update with the kernel of ``torch.optim.AdamW(fused=True)``, in one pass over the tensors.

    The kernel reads the learning rate, the count, the gradients' divisor and whether to skip the
    update from the device, so the host does not wait for them. ``torch.optim.AdamW`` itself would
    need a count for every parameter and its gradients in ``.grad``, where FSDP2 has DTensors.

    Returns:
        True; None if the tensors are traced, or have more than one dtype.
    """
    parameters = tensors.parameters
    if not runs_eagerly(scalars.lr.device) or not parameters:
        return None
    state = (*parameters, *tensors.gradients, *tensors.first, *tensors.second)
    if len({tensor.dtype for tensor in state}) > 1:
        return None
    # The kernel takes all tensors of a parameter to have its layout.
    gradients = [
        gradient if gradient.stride() == parameter.stride() else gradient.contiguous()
        for gradient, parameter in zip(tensors.gradients, parameters, strict=True)
    ]
    count = scalars.step.to(torch.float32) + 1
    torch._fused_adamw_(
        parameters,
        gradients,
        tensors.first,
        tensors.second,
        [],
        [count] * len(parameters),
        lr=scalars.lr,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if scalars.factor is None else scalars.factor.reciprocal(),
        found_inf=(~scalars.where).to(torch.float32),
    )
    return True


def average(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """Average with elementary operations."""
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, values, alpha=1 - decay)


def interpolate(averages: list[Tensor], values: list[Tensor], decay: float) -> bool | None:
    """Average in one pass.

    Returns:
        True; None if the tensors are traced.
    """
    if not runs_eagerly(averages[0].device):
        return None
    torch._foreach_lerp_(averages, values, 1 - decay)
    return True


for _device in ("cpu", "cuda", "xpu"):
    dispatch.register("adamw_", _device, fused_adamw)
    dispatch.register("average_", _device, interpolate)
