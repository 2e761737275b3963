"""Layer normalisation that stays on its rows when the batch is split over devices.

torch_xla lowers ``layer_norm`` to a batch norm over all rows of the batch, flattened. The
partitioner knows no way to split that one, so every layer norm gathers the activations of the whole
batch on every device and normalises all of them there. Written out as means it needs no other row:
nothing is gathered, and one device gives the numbers of four, to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowLayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` from elementary operations; over the last dimension alone."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., C) -> the same shape; float32 inside, and outside under autocast."""
        x = input.float()
        deviations = x - x.mean(-1, keepdim=True)
        variance = deviations.square().mean(-1, keepdim=True)
        result = deviations * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            result = result * self.weight
        if self.bias is not None:
            result = result + self.bias
        return result if torch.is_autocast_enabled(input.device.type) else result.to(input.dtype)


def keep_norms_on_rows(module: nn.Module) -> nn.Module:
    """Turn the layer norms in ``module`` into ``RowLayerNorm``, in place: same parameters, same
    state dict, same numbers up to rounding.
    """
    for child in module.modules():
        if type(child) is nn.LayerNorm and len(child.normalized_shape) == 1:
            child.__class__ = RowLayerNorm
    return module
