"""Scan: blocks that are alike are compiled once and run in a loop.

The program of a deep model shrinks to that of one block, and so does the time to compile it. What
it costs at run time: the weights of the blocks are stacked at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch_xla.experimental.scan
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

Tracing = Callable[[], AbstractContextManager[Any]]


def scan_alike(blocks: Sequence[nn.Module], tracing: Tracing) -> None:
    """Make each row of blocks that are alike run as a loop, begun by its first.

    The others of the row then pass on what they are given. The state dict stays as it is.

    Args:
        blocks: called one after another, each with what the one before it returned and with the
            same inputs besides.
        tracing: entered while a block is traced on tensors that have no content.
    """
    # How gradients are split is said where weights are used (``xla_gathering``). torch_xla would
    # say it again with a function of jax, for which it needs torchax, flax and what they bring.
    torch_xla.experimental.scan.shard_as = lambda a, b: (a, b)
    for row in _rows(blocks):
        first, *others = row
        for block in row:
            kind: Any = type(block)
            block.__class__ = _looping(kind) if block is first else _passing(kind)
        first.row = [first, *others]  # type: ignore[assignment]  # a list: no children of its own
        first.tracing = tracing  # type: ignore[assignment]


def _rows(blocks: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Neighbours of one class whose parameters have the same names and shapes, two or more."""

    def likeness(block: nn.Module) -> object:
        return type(block), [(name, p.shape) for name, p in block.named_parameters()]

    for _, row in groupby(blocks, key=likeness):
        found = list(row)
        if len(found) > 1 and next(found[0].buffers(), None) is None:
            yield found


@cache
def _passing(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a block whose work the first of its row has done."""

    def forward(self: Any, x: Tensor, *_: Any) -> Tensor:
        return x

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})


@cache
def _looping(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of the first block of a row, which does the work of all."""

    def forward(self: Any, *inputs: Any) -> Tensor:
        given, structure = pytree.tree_flatten(inputs)
        names = [name for name, _ in self.named_parameters()]
        of_blocks = [dict(block.named_parameters()) for block in self.row]
        stacked = [torch.stack([block[name] for block in of_blocks]) for name in names]
        if not hasattr(self, "body"):
            # Kept: by the function itself torch_xla knows that it has traced it before.
            self.body = _body(self, kind.forward, names, structure)
        with self.tracing():
            (result, *_), _ = torch_xla.experimental.scan.scan(
                self.body, tuple(given), stacked, is_fn_pure=True
            )
        return result

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})


def _body(
    block: nn.Module, forward: Callable[..., Tensor], names: list[str], structure: Any
) -> Callable[[tuple[Tensor, ...], list[Tensor]], tuple[tuple[Tensor, ...], None]]:
    """One round: from what the round before returned and the parameters of a block."""

    def body(
        carried: tuple[Tensor, ...], parameters: list[Tensor]
    ) -> tuple[tuple[Tensor, ...], None]:
        with _reparametrize_module(block, dict(zip(names, parameters, strict=True))):
            result = forward(block, *pytree.tree_unflatten(list(carried), structure))
        _, *others = carried
        # what is passed on as it came must not be the very same tensor
        return (result.to(carried[0].dtype), *(other.clone() for other in others)), None

    return body
