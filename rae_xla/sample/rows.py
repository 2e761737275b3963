"""Rows of a batch: how many per device, padding, sharding them and gathering the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from rae_xla.runtime import Backend, Batch

T = TypeVar("T")

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


def send_rows(backend: Backend, rows: Mapping[str, Tensor], first: int) -> Batch:
    """Move the rows of a batch that this process holds to the devices.

    Args:
        backend: where the rows go.
        rows: host tensors with equally many rows, as many in every process.
        first: position of the first of them in the batch. The processes together hold every
            position once.

    Returns:
        The sharded rows, and their positions for :func:`collect_rows`.
    """
    count = len(next(iter(rows.values())))
    positions = torch.arange(first, first + count, dtype=torch.int32)
    return backend.shard_batch({**rows, _POSITION: positions})


def collect_rows(
    backend: Backend, batch: Batch, results: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Gather results of shared rows on the host of every process, in the order of the rows.

    Args:
        backend: where the results are.
        batch: what :func:`share_rows` or :func:`send_rows` returned.
        results: sharded tensors with one row for each row of ``batch``.

    Returns:
        Host tensors without the rows that :func:`share_rows` repeated as padding.

    Raises:
        RuntimeError: the devices of all processes together lack a row.
    """
    return collect_rows_later(backend, batch, results)()


def collect_rows_later(
    backend: Backend, batch: Batch, results: Mapping[str, Tensor]
) -> Callable[[], dict[str, Tensor]]:
    """Start to gather results of shared rows; the function returns what ``collect_rows`` does."""
    later = backend.to_host_later({**results, _POSITION: batch[_POSITION]})
    return lambda: _in_order(later())


def _in_order(host: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return rows in the order of their positions, each once."""
    # The processes of a pod need not hold consecutive rows: a row is on the device that has its
    # place in the mesh, and devices are not numbered in the order of the processes. Padding repeats
    # a row with its position, so each position keeps one of the equal rows.
    position = host.pop(_POSITION).long()
    order = torch.full((int(position.max()) + 1,), -1)
    order[position] = torch.arange(len(position))
    if int(order.min()) < 0:
        raise RuntimeError(
            f"the devices hold {int((order >= 0).sum())} different rows of a batch of {len(order)}"
        )
    return {name: rows[order] for name, rows in host.items()}


def in_flight(started: Iterable[Callable[[], T]], depth: int = 1) -> Iterator[T]:
    """Yield the results of work that was started, in order and ``depth`` items later.

    The devices compute the next items while the host uses a result.

    Args:
        started: functions that wait for a result, such as ``collect_rows_later`` returns; asking
            for the next one starts its work.
        depth: number of items that are started before the first is waited for.
    """
    pending: deque[Callable[[], T]] = deque()
    for finish in started:
        pending.append(finish)
        if len(pending) > depth:
            yield pending.popleft()()
    while pending:
        yield pending.popleft()()
