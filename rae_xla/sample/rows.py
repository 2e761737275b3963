"""Rows of a batch: how many per device, padding, sharding them and gathering the results."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rae_xla.runtime import Backend, Batch

_POSITION = "position"  # name of the extra tensor that records each row's position in the batch

# Measured with a tiny model: 16 images of 4x4 tokens per device are slower by a quarter than 32,
# single images six times slower, and more than 32 no faster.
_CPU_TOKENS = 512
_CPU_SINGLE_IMAGE_TOKENS = 256  # from here on, the matrices of one image are large enough


def rows_per_device(backend: Backend, batch: int, *, tokens: int) -> int:
    """Return how many images each device processes together.

    A matrix product of one row is not bit-identical to that row of a product of eight, because
    libraries choose their kernels by shape. On a CPU the shape is therefore constant, whatever the
    batch size: 512 tokens (32 images of 4x4), or a single image from 16x16 tokens on.

    Args:
        backend: where the images are processed.
        batch: requested batch size over all devices; it determines the result unless the devices
            are CPUs.
        tokens: tokens in the latents of one image.
    """
    if backend.on_cpu:
        return 1 if tokens >= _CPU_SINGLE_IMAGE_TOKENS else _CPU_TOKENS // tokens
    return -(-batch // backend.mesh.batch_shards)


def pad_rows(rows: Tensor, multiple: int) -> Tensor:
    """Repeat the last row until the number of rows is a multiple of ``multiple``."""
    missing = -len(rows) % multiple
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def share_rows(backend: Backend, rows: Mapping[str, Tensor]) -> Batch:
    """Move rows that every process holds to the devices, each process a share of them.

    Args:
        backend: where the rows go.
        rows: host tensors with equally many rows, the same in every process. The last row is
            repeated until the rows divide evenly among the devices.

    Returns:
        The sharded rows, and their positions for :func:`collect_rows`.
    """
    count = len(next(iter(rows.values())))
    positions = {_POSITION: torch.arange(count, dtype=torch.int32)}
    padded = {n: pad_rows(t, backend.mesh.batch_shards) for n, t in {**rows, **positions}.items()}
    share = len(padded[_POSITION]) // backend.process_count
    own = slice(backend.process_index * share, (backend.process_index + 1) * share)
    return backend.shard_batch({name: t[own].contiguous() for name, t in padded.items()})


def collect_rows(
    backend: Backend, batch: Batch, results: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gather results of shared rows on the host of every process, in the order of the rows.

    Args:
        backend: where the results are.
        batch: what :func:`share_rows` returned.
        results: sharded tensors with one row for each row of ``batch``.

    Returns:
        Host tensors without the rows that were repeated as padding.
    """
    host = backend.to_host({**results, _POSITION: batch[_POSITION]})
    # The processes of a pod need not hold consecutive rows. Padding repeats a row with its
    # position, so each position keeps one of the equal rows.
    position = host.pop(_POSITION).long()
    order = torch.empty(int(position.max()) + 1, dtype=torch.long)
    order[position] = torch.arange(len(position))
    return {name: rows[order] for name, rows in host.items()}
