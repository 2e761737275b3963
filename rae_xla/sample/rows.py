"""Rows that every process has, worked through by all devices together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rae_xla.runtime import Batch, Runtime
from rae_xla.sample.pictures import pad_rows

_PLACE = "place"
_CPU_TOKENS = 512
_TALL = 256  # tokens of a picture whose matrices are tall enough alone


def rows_per_device(runtime: Runtime, batch: int, *, tokens: int) -> int:
    """How many pictures each device works on together.

    A matrix product of one row is not, to the bit, that row of the product of eight: libraries
    choose their kernels by the shape. So on a CPU the shape is always the same, whatever the batch:
    small pictures as many as make 512 tokens, 32 of 4x4, and from 16x16 on one. For a tiny model
    fewer are slower (by a quarter with 16 of 4x4, sixfold one by one) and more are no faster.

    Args:
        runtime: where.
        batch: pictures asked for at a time, over all devices; what counts on other devices.
        tokens: of one picture's latents.
    """
    if runtime.on_cpu:
        return 1 if tokens >= _TALL else _CPU_TOKENS // tokens
    return -(-batch // runtime.mesh.batch_parts)


def share_rows(runtime: Runtime, rows: Mapping[str, Tensor]) -> Batch:
    """Put rows on the devices, each process a share of them.

    Args:
        runtime: where to.
        rows: tensors of equally many rows on the host, the same in every process. The last row is
            repeated until they divide evenly among the devices.
    """
    count = len(next(iter(rows.values())))
    places = {_PLACE: torch.arange(count, dtype=torch.int32)}
    padded = {n: pad_rows(t, runtime.mesh.batch_parts) for n, t in {**rows, **places}.items()}
    share = len(padded[_PLACE]) // runtime.process_count
    own = slice(runtime.process_index * share, (runtime.process_index + 1) * share)
    return runtime.put({name: t[own].contiguous() for name, t in padded.items()})


def collect_rows(runtime: Runtime, batch: Batch, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was made of rows that were shared, on the host of every process: a row for each, in
    their order.
    """
    host = runtime.to_host({**made, _PLACE: batch[_PLACE]})
    # Processes need not lie in their order on a pod; a row that was repeated has one place.
    place = host.pop(_PLACE).long()
    order = torch.empty(int(place.max()) + 1, dtype=torch.long)
    order[place] = torch.arange(len(place))
    return {name: whole[order] for name, whole in host.items()}
