"""Rematerialisation: activations inside a block are computed again in the backward pass, not kept.

It costs a second forward pass of the block and frees what lies between its input and its output
(Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

Recompute = Callable[[Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor]
"""``recompute(run, parameters, inputs)``: ``run(*parameters, *inputs)``, twice if need be."""


def rematerialise(blocks: Sequence[nn.Module], share: float, recompute: Recompute) -> None:
    """Make ``share`` of the blocks, evenly spread, forget their activations.

    The state dict stays as it is. What the block is told (tensors, or tuples of them) and its
    parameters are handed to ``recompute``, so that it can keep the second pass apart from the
    first.
    """
    for block in evenly_spread(blocks, share):
        kind: Any = type(block)
        block.__class__ = _forgetful(kind)
        block.recompute = recompute  # type: ignore[assignment]


def evenly_spread(blocks: Sequence[nn.Module], share: float) -> list[nn.Module]:
    """``share`` of the blocks."""
    count = round(share * len(blocks))
    return [
        block
        for i, block in enumerate(blocks)
        if (i + 1) * count // len(blocks) > i * count // len(blocks)
    ]


@cache
def _forgetful(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a block with a ``forward`` that keeps its inputs alone."""

    def forward(self: Any, *inputs: Any) -> Tensor:
        names, parameters = zip(*self.named_parameters(), strict=True)
        given, structure = pytree.tree_flatten(inputs)

        def run(*tensors: Tensor) -> Tensor:
            values = dict(zip(names, tensors, strict=False))
            with _reparametrize_module(self, values):
                told = pytree.tree_unflatten(tensors[len(names) :], structure)
                result: Tensor = kind.forward(self, *told)
                return result

        result: Tensor = self.recompute(run, parameters, given)
        return result

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})
