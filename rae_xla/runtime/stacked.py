"""Parameters of blocks that are alike, stored as one: what they are called, and the way back.

In place of ``blocks.0`` to ``blocks.27`` a module then has ``blocks.0:28``, whose parameters have
one dimension more, the first. Checkpoints know nothing of it: what leaves the devices is cut up
again, what is sent to them is put together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rae_xla.runtime.snapshot import HostShard, HostTensor

_ROW = re.compile(r"(?<![^.])(\d+):(\d+)(?=\.|$)")


def row_name(first: int, end: int) -> str:
    """Of the module that stands for blocks ``first`` to ``end - 1``."""
    return f"{first}:{end}"


def names_in(name: str) -> list[str]:
    """The names that one of a parameter, or of what belongs to it, stands for; itself if it is of
    one block, or of none.
    """
    found = _ROW.search(name)
    if found is None:
        return [name]
    begin, end = found.span()
    return [f"{name[:begin]}{i}{name[end:]}" for i in range(*map(int, found.groups()))]


def put_together(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """``names`` of ``tensors``, stacked where a name stands for several of them."""
    parts = {name: [tensors[one] for one in names_in(name)] for name in names}
    return {name: torch.stack(of) if _is_row(name) else of[0] for name, of in parts.items()}


def cut_up(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each block's part of host tensors, in the same memory."""
    parts = ((name, t.unbind() if _is_row(name) else [t]) for name, t in tensors.items())
    return {one: part for name, of in parts for one, part in zip(names_in(name), of, strict=True)}


def cut_snapshot(tensors: Mapping[str, HostTensor]) -> dict[str, HostTensor]:
    """The same for what one process is to write of tensors, of which no block is in parts."""
    result: dict[str, HostTensor] = {}
    for name, tensor in tensors.items():
        if not _is_row(name):
            result[name] = tensor
            continue
        for i, one in enumerate(names_in(name)):
            shards = (HostShard(s.data[i], s.offsets[1:]) for s in tensor.shards)
            result[one] = HostTensor(tensor.shape[1:], tuple(shards))
    return result


def _is_row(name: str) -> bool:
    return _ROW.search(name) is not None
