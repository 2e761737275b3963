"""Chunks: batches of constant size that every evaluation network works on.

A matrix product of another number of rows may round differently, and a single 8-bit pixel that
differs changes every metric. Each device therefore always works on ``CHUNK`` rows, whatever batch
size a user requests: metrics depend neither on the batch size nor on the number of devices, and
nothing is compiled twice.

The rows that a process sends need not be consecutive in the global tensor (see
``sample.rows.collect_rows``). The position of every row in its chunk is sent along, and results are
sorted by it before the padding of the last chunk is cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rae_xla.runtime import Backend, Batch
from rae_xla.sample.rows import pad_rows, share_rows

CHUNK = 8
"""Rows of a chunk on each device."""


def chunk_rows(backend: Backend) -> int:
    """Return the rows of a chunk over all devices."""
    return CHUNK * backend.mesh.batch_shards


def local_rows(backend: Backend) -> slice:
    """Return the rows of a chunk that this process feeds."""
    rows = chunk_rows(backend) // backend.process_count
    return slice(backend.process_index * rows, (backend.process_index + 1) * rows)


def on_devices(
    backend: Backend, parts: Iterable[NDArray[Any]]
) -> Iterator[tuple[NDArray[Any], Batch]]:
    """Move arrays to the devices, one chunk at a time.

    Args:
        backend: where they go.
        parts: arrays of at most ``chunk_rows`` rows, the same on every process.

    Yields:
        Each part, and a chunk on the devices whose ``rows`` contain it; the part's last row pads
        it.
    """
    for part in parts:
        rows = pad_rows(torch.from_numpy(np.array(part)), chunk_rows(backend))
        yield part, share_rows(backend, {"rows": rows})
