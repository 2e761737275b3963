"""Rows that every process has, worked through by all devices together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rae_xla.runtime import Batch, Runtime
from rae_xla.sample.pictures import pad_rows

_PLACE = "place"


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
