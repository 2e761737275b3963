"""The arithmetic of a step where one program sees the whole batch and whole tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class WholeBatch:
    """Part of a ``Runtime`` whose functions are given the global batch: XLA's partitioner divides
    the work behind the step's back, and a single device has nothing to divide.
    """

    def average(self, values: Sequence[Tensor]) -> list[Tensor]:
        """They are of the whole batch already."""
        return list(values)

    def gradients(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """What the backward passes left; zeros where that is nothing."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The L2 norm of all elements."""
        return torch.nn.utils.get_total_norm(tensors)

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """All of them."""
        return list(tensors)
