"""Scan: blocks that are alike are compiled once and run in a loop.

Their parameters are stored as one, stacked (``stacked``), and so is all that belongs to them: not
only their forward and backward passes shrink to those of one block, but the update of each
parameter too, and with them the time to trace and compile a deep model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cache
from itertools import groupby
from typing import Any

import torch
import torch_xla.experimental.scan
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from rae_xla.runtime.stacked import row_name

Tracing = Callable[[], AbstractContextManager[Any]]


def scan_alike(
    network: nn.Module, blocks: Mapping[str, nn.Module], remat: float, tracing: Tracing
) -> list[nn.Module]:
    """Make each row of blocks that are alike run as a loop, begun by its first.

    The first then has the parameters of all and a name that says so; the others have none and pass
    on what they are given.

    Args:
        network: what the blocks are in, on the host.
        blocks: its blocks by name, in the order in which they are called: each with what the one
            before it returned and with the same inputs besides.
        remat: share of a row, its first blocks, that keep nothing but their input; they are a loop
            of their own.
        tracing: entered while a block is traced on tensors that have no content.

    Returns:
        The blocks that are like none of their neighbours.
    """
    # How gradients are split is said where weights are used (``xla_gathering``). torch_xla would
    # say it again with a function of jax, for which it needs torchax, flax and what they bring.
    torch_xla.experimental.scan.shard_as = lambda a, b: (a, b)
    alone = []
    for names in list(_rows(blocks)):
        row = [blocks[name] for name in names]
        if len(row) == 1 or next(row[0].buffers(), None) is not None:
            alone += row
            continue
        forgetful = _share(remat, len(row))
        for part, partition in (
            (slice(forgetful), _keep_inputs),
            (slice(forgetful, None), min_cut_rematerialization_partition),
        ):
            if names[part]:
                _make_loop(network, names[part], row[part], partition, tracing)
    return alone


def _share(share: float, count: int) -> int:
    """That of ``count`` blocks, so that none is left alone."""
    some = round(share * count)
    return round(share) * count if 1 in (some, count - some) else some


def _make_loop(
    network: nn.Module, names: list[str], row: list[nn.Module], partition: Any, tracing: Tracing
) -> None:
    _stack(row)
    for block in row:
        kind: Any = type(block)
        block.__class__ = _looping(kind) if block is row[0] else _passing(kind)
    first_block: Any = row[0]
    first_block.partition, first_block.tracing = partition, tracing
    owner, _, first = names[0].rpartition(".")
    _rename(network.get_submodule(owner), first, row_name(int(first), int(first) + len(row)))


def _rows(blocks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Neighbours of one class whose parameters have the same names and shapes."""

    def likeness(name: str) -> object:
        block = blocks[name]
        own = [(n, p.shape, p.requires_grad) for n, p in block.named_parameters()]
        return name.rpartition(".")[0], type(block), own

    for _, row in groupby(blocks, key=likeness):
        yield list(row)


def _stack(row: list[nn.Module]) -> None:
    """Move the parameters of all to the first, stacked."""
    for name, parameter in list(row[0].named_parameters()):
        owner, _, last = name.rpartition(".")
        owners = [block.get_submodule(owner) for block in row]
        whole = torch.stack([one.get_parameter(last).detach() for one in owners])
        for one in owners:
            delattr(one, last)
        whole_parameter = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        owners[0].register_parameter(last, whole_parameter)


def _rename(owner: nn.Module, old: str, new: str) -> None:
    children = {new if name == old else name: child for name, child in owner._modules.items()}
    owner._modules.clear()
    owner._modules.update(children)


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
        names, stacked = zip(*self.named_parameters(), strict=True)
        if not torch.is_grad_enabled():
            x, *others = inputs
            for parameters in zip(*stacked, strict=True):
                with _reparametrize_module(self, dict(zip(names, parameters, strict=True))):
                    x = kind.forward(self, x, *others)
            return x
        given, structure = pytree.tree_flatten(inputs)
        if not hasattr(self, "body"):
            # Kept: by the function itself torch_xla knows that it has traced it before.
            self.body = _body(self, kind.forward, names, structure)
        with self.tracing():
            (result, *_), _ = torch_xla.experimental.scan.scan(
                self.body, tuple(given), list(stacked), self.partition, is_fn_pure=True
            )
        return result

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})


def _keep_inputs(*arguments: Any, **options: Any) -> Any:
    """Cut a block into a forward pass that keeps its inputs alone, and a backward pass that begins
    with another forward pass.
    """
    with functorch_config.patch(activation_memory_budget=0.0):
        return min_cut_rematerialization_partition(*arguments, **options)


def _body(
    block: nn.Module, forward: Callable[..., Tensor], names: tuple[str, ...], structure: Any
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
