"""Outputs that a diffusion transformer computes from an intermediate block.

The base head (RAEv2, arXiv 2605.18324) predicts the same target as the model from the tokens of an
early block. It is trained with the same loss, and sampling extrapolates from its prediction to the
model's (internal guidance). The REPA projection (Yu et al. 2025) maps tokens to the features of a
frozen encoder, with which they are aligned in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from rae_xla.errors import UserError


class DenoiserOutputs(NamedTuple):
    """All outputs of a diffusion transformer.

    Attributes:
        full: the model's prediction (B, C, H, W).
        base: the prediction of the base head, of the same shape; None without such a head.
        repa: the projected tokens (B, N, z_dim); None without the projection.
    """

    full: Tensor
    base: Tensor | None = None
    repa: Tensor | None = None


def check_depth(name: str, depth: int | None, blocks: int) -> None:
    """Raise ``UserError`` unless the option ``name`` is None or the number of one of the blocks."""
    if depth is not None and not 1 <= depth <= blocks:
        raise UserError(
            f"{name}: expected the number of a block that the head reads, from 1 to {blocks}, got "
            f"{depth}"
        )


def mark_read_blocks(blocks: Sequence[nn.Module], *depths: int | None) -> None:
    """Mark the blocks whose output is read by more than the next block.

    A backend that runs several blocks as one loop ends the loop at a marked block
    (``runtime.xla.scan``).

    Args:
        blocks: the blocks in order.
        depths: numbers of blocks, from 1; None for no block.
    """
    for depth in depths:
        if depth is not None:
            blocks[depth - 1].output_is_read = True  # type: ignore[assignment]


def repa_projector(depth: int | None, dim: int, z_dim: int | None) -> nn.Linear | None:
    """Build the projection of REPA; None without a depth.

    Raises:
        UserError: there is a depth, but no number of channels.
    """
    if depth is None:
        return None
    if z_dim is None:
        raise UserError(
            f"z_dim: repa_layer_depth is {depth}, so the number of channels of the target encoder "
            "must be given"
        )
    return nn.Linear(dim, z_dim)
