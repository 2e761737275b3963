"""Private APIs of torch 2.9.1 that the torch backend needs."""

from __future__ import annotations

from torch._dynamo.utils import counters


def compiled_graphs() -> int:
    """Return how many graphs ``torch.compile`` has compiled; no public API counts them."""
    return int(counters["stats"]["unique_graphs"])
