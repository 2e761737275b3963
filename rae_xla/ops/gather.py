"""Selection of tokens by their positions, dispatched on the device."""

from __future__ import annotations

from torch import Tensor

from rae_xla.ops import dispatch


def gather_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Select tokens of each row: ``values[b, index[b, k]]``.

    Args:
        values: (B, N, ...).
        index: (B, K) int64, from 0 to N - 1.

    Returns:
        (B, K, ...).
    """
    result: Tensor | None = dispatch.call("gather_tokens", values.device.type, values, index)
    return gather_rows(values, index) if result is None else result


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """``gather_tokens`` in plain PyTorch."""
    return values.gather(1, expand_index(index, values))


def expand_index(index: Tensor, values: Tensor) -> Tensor:
    """Return an index (B, K) as ``torch.gather`` takes it for ``values``, (B, K, ...)."""
    trailing = values.shape[2:]
    return index.reshape(*index.shape, *(1,) * len(trailing)).expand(-1, -1, *trailing)
