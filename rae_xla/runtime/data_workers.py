"""How many processes decode images for the devices of a run."""

from __future__ import annotations

import os

from rae_xla.runtime.backend import Backend

MAX_DEFAULT_WORKERS = 8


def worker_count(backend: Backend, wanted: int | None) -> int:
    """Return the number of data worker processes: ``data.num_workers``, or its default.

    A GPU computes faster than a thread decodes. By default each process that has one gets its share
    of the cores of its host, less the core that it runs on itself. CPUs and XLA get none.

    Args:
        backend: of the run.
        wanted: the setting; None for the default.
    """
    if wanted is not None:
        return wanted
    if backend.name == "xla" or backend.on_cpu:
        return 0
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this host, from torchrun
    return max(0, min(MAX_DEFAULT_WORKERS, _cores() // processes - 1))


def _cores() -> int:
    """Return the cores that this process may use; macOS cannot tell them from all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
