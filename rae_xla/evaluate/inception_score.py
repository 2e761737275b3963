"""Inception Score, in the protocols of the ADM suite and of torch-fidelity."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ADM_SPLIT = 5000
FIDELITY_SPLITS, FIDELITY_SEED = 10, 2020


class ScoreStream:
    """Computes the Inception Score of logits that arrive in parts, in order.

    The score is ``mean over splits of exp(mean KL(p(y|x) || p(y)))`` (Salimans et al. 2016). Sums
    are float64, row by row, so that the division into parts does not change them.

    Args:
        split_of: (N,) the split of each image, from 0 without gaps.
    """

    def __init__(self, split_of: NDArray[np.int64]) -> None:
        self._split_of = torch.from_numpy(split_of)
        self._sizes = torch.bincount(self._split_of)
        self._seen = 0
        self._sums: Tensor | None = None
        self._negative_entropies = torch.zeros(len(self._sizes), dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Add the logits (n, classes) of the next images, on the host."""
        splits = self._split_of[self._seen : self._seen + len(logits)]
        self._seen += len(logits)
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        if self._sums is None:
            self._sums = p.new_zeros(len(self._sizes), p.shape[1])
        self._sums.index_add_(0, splits, p)
        self._negative_entropies.index_add_(0, splits, (p * log_p).sum(1))

    def score(self) -> float:
        """Return the score of all N images, which must have been added."""
        assert self._sums is not None, "no logits were added"
        assert self._seen == len(self._split_of), "logits of some images are missing"
        marginal = self._sums / self._sizes[:, None]
        entropies = torch.xlogy(marginal, marginal).sum(1)
        return (self._negative_entropies / self._sizes - entropies).exp().mean().item()


def adm_splits(count: int) -> NDArray[np.int64]:
    """Return the splits (count,) of the ADM suite: 5,000 consecutive images each.

    The last split may be smaller (Dhariwal and Nichol 2021, ``evaluator.py``).
    """
    return np.arange(count, dtype=np.int64) // ADM_SPLIT


def fidelity_splits(count: int) -> NDArray[np.int64]:
    """Return the splits (count,) of torch-fidelity: ten of equal size, shuffled with its seed.

    ``count`` must be at least 10.
    """
    order = np.random.RandomState(FIDELITY_SEED).permutation(count)
    ends = np.arange(1, FIDELITY_SPLITS + 1) * count // FIDELITY_SPLITS
    split_of = np.empty(count, np.int64)
    split_of[order] = np.searchsorted(ends, np.arange(count), side="right")
    return split_of
