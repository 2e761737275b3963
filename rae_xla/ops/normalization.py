"""Normalisation over the last dimension: RMSNorm, and LayerNorm dispatched on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rae_xla.ops import dispatch


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 (Zhang & Sennrich 2019).

    The input's dtype is restored before the weight is applied, and the weight is never cast.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., dim)."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last dimension, computed by ``layer_norm``; otherwise PyTorch's."""

    def __init__(self, dim: int, eps: float = 1e-5, elementwise_affine: bool = True) -> None:
        super().__init__(dim, eps, elementwise_affine)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (..., dim)."""
        return layer_norm(input, self.weight, self.bias, self.eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension of ``x`` to mean 0 and variance 1, then apply an affine map.

    Args:
        x: (..., C).
        weight: (C,), or None for no scale.
        bias: (C,), or None for no shift.
        eps: added to the variance.

    Returns:
        (..., C), in float32 under autocast and in the dtype of ``x`` otherwise.
    """
    result: Tensor | None = dispatch.call("layer_norm", x.device.type, x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps) if result is None else result


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute a layer norm from elementary operations on each row, for a partitioned batch.

    torch_xla lowers ``F.layer_norm`` to a batch norm over all rows of the batch. The SPMD
    partitioner cannot split that one: every device gathers and normalises the activations of the
    global batch. Means over the last dimension need no other row, so that nothing is gathered and
    the result does not depend on the number of devices, to the last bit.
    """
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    result = centred * torch.rsqrt(variance + eps)
    if weight is not None:
        result = result * weight
    if bias is not None:
        result = result + bias
    return result if torch.is_autocast_enabled(x.device.type) else result.to(x.dtype)


dispatch.register("layer_norm", "xla", row_layer_norm)
