"""Rows to the devices in chunks of one shape.

A matrix product rounds differently for another number of rows, and one 8-bit pixel that is rounded
the other way moves every metric. So whatever a user asks for, each device always works on ``CHUNK``
rows: results do not depend on batch size or device count, and nothing is compiled twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rae_xla.runtime import Runtime
from rae_xla.sample.pictures import pad_rows

CHUNK = 8


def chunk_rows(runtime: Runtime) -> int:
    """Rows of a chunk over all devices."""
    return CHUNK * runtime.mesh.batch_parts


def own_rows(runtime: Runtime) -> slice:
    """The rows of a chunk that this process feeds."""
    rows = chunk_rows(runtime) // runtime.process_count
    return slice(runtime.process_index * rows, (runtime.process_index + 1) * rows)


def on_devices(
    runtime: Runtime, parts: Iterable[NDArray[Any]]
) -> Iterator[tuple[NDArray[Any], Tensor]]:
    """Put rows on the devices, part by part.

    Args:
        runtime: where they go.
        parts: at most ``chunk_rows`` rows each, the same on every process.

    Yields:
        The part itself, and a whole chunk of it on the devices; rows beyond the part repeat its
        last.
    """
    for part in parts:
        rows = pad_rows(torch.from_numpy(np.array(part)), chunk_rows(runtime))
        yield part, runtime.put({"rows": rows[own_rows(runtime)].contiguous()})["rows"]
