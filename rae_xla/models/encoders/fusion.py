"""Fusion of the outputs of several encoder blocks to one token per patch (RAEv2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rae_xla.errors import UserError

FUSIONS = ("mean", "sum")


@dataclass(frozen=True)
class LayerFusion:
    """Which blocks of an encoder are read, and how their normalised outputs are combined.

    Attributes:
        layers: blocks, counted from 0.
        fusion: ``mean`` or ``sum`` over the layers.
        token_mean: add the mean over all patch tokens of the last layer in ``layers`` to every
            token.

    Raises:
        UserError: there are no layers, a layer is listed twice, or the fusion is unknown.
    """

    layers: tuple[int, ...]
    fusion: str = "mean"
    token_mean: bool = False

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise UserError(
                f"layers: expected a list of different blocks, counted from 0, got "
                f"{list(self.layers)}"
            )
        if self.fusion not in FUSIONS:
            raise UserError(f"fusion: {self.fusion!r} is not one of {', '.join(FUSIONS)}")

    def check(self, count: int) -> None:
        """Raise ``UserError`` if the encoder, with ``count`` blocks, does not have all layers."""
        if missing := [layer for layer in self.layers if not 0 <= layer < count]:
            raise UserError(
                f"layers: the encoder has the blocks 0 to {count - 1}, but not "
                f"{', '.join(map(str, missing))}"
            )

    def combine(self, tokens: Sequence[Tensor]) -> Tensor:
        """Combine normalised patch tokens (B, N, C), one tensor for each layer in their order."""
        total = tokens[0]
        for layer in tokens[1:]:
            total = total + layer
        if self.fusion == "mean":
            total = total / len(tokens)
        if self.token_mean:
            total = total + tokens[-1].mean(dim=1, keepdim=True)
        return total

    def code(self) -> Tensor:
        """Return the fusion as integers: the layers, the kind, and whether there is a token mean.

        An encoder has them in its state dict, so that fingerprints, and with them provenance,
        depend on the layers and not only on the weights.
        """
        return torch.tensor([*self.layers, FUSIONS.index(self.fusion), int(self.token_mean)])


def make_fusion(layers: Sequence[int] | None, fusion: str, token_mean: bool) -> LayerFusion | None:
    """Return the fusion that an encoder's options describe; None for the last block alone.

    Raises:
        UserError: the options are invalid, or there are some without ``layers``.
    """
    if layers is not None:
        return LayerFusion(tuple(layers), fusion, token_mean)
    if token_mean or fusion != "mean":
        raise UserError(
            "encoder_params: fusion and token_mean require layers, the list of blocks to combine"
        )
    return None
