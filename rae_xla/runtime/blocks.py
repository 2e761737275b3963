"""Stacks of blocks: which of them to rematerialise, and parameters that are stored stacked.

A backend may store the parameters of identical blocks as one tensor with a leading block dimension.
In place of ``blocks.0`` to ``blocks.27`` a module then has a child ``blocks.0:28``. Checkpoints do
not depend on it: tensors are unstacked when they leave the devices, and stacked when they are sent
to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rae_xla.runtime.snapshot import HostShard, HostTensor

# A path component such as "0:28".
_STACKED = re.compile(r"(?<![^.])(\d+):(\d+)(?=\.|$)")


def evenly_spread(blocks: Sequence[nn.Module], share: float) -> list[nn.Module]:
    """Return ``share`` (0 to 1) of the blocks, evenly spread over their order."""
    count = round(share * len(blocks))
    return [
        block
        for i, block in enumerate(blocks)
        if (i + 1) * count // len(blocks) > i * count // len(blocks)
    ]


def stacked_name(first: int, end: int) -> str:
    """Return the name of the module that stores the blocks ``first`` to ``end - 1``."""
    return f"{first}:{end}"


def unstacked_names(name: str) -> list[str]:
    """Return the names of one tensor in each block that ``name`` covers.

    Args:
        name: of a parameter, or a path that contains one, such as ``ema/blocks.0:28.w3.weight``.

    Returns:
        A name for each block; ``[name]`` for a tensor that is not stacked.
    """
    found = _STACKED.search(name)
    if found is None:
        return [name]
    begin, end = found.span()
    return [f"{name[:begin]}{i}{name[end:]}" for i in range(*map(int, found.groups()))]


def stack(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors called ``names``, stacked along a new first dimension where they are.

    Args:
        tensors: by the names of single blocks.
        names: of a module that may store blocks stacked.

    Raises:
        KeyError: a tensor is missing.
    """
    parts = {name: [tensors[one] for one in unstacked_names(name)] for name in names}
    return {name: torch.stack(of) if _is_stacked(name) else of[0] for name, of in parts.items()}


def unstack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of single blocks, as views of host tensors; the inverse of ``stack``."""
    parts = ((name, t.unbind() if _is_stacked(name) else [t]) for name, t in tensors.items())
    return {
        one: part
        for name, of_name in parts
        for one, part in zip(unstacked_names(name), of_name, strict=True)
    }


def unstack_snapshot(tensors: Mapping[str, HostTensor]) -> dict[str, HostTensor]:
    """Do the same for the shards of one process; stacked tensors are not sharded by block."""
    result: dict[str, HostTensor] = {}
    for name, tensor in tensors.items():
        if not _is_stacked(name):
            result[name] = tensor
            continue
        for i, one in enumerate(unstacked_names(name)):
            shards = (HostShard(s.data[i], s.offsets[1:]) for s in tensor.shards)
            result[one] = HostTensor(tensor.shape[1:], tuple(shards))
    return result


def _is_stacked(name: str) -> bool:
    return _STACKED.search(name) is not None
