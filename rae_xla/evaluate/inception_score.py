"""The Inception Score: how sure the network is of each picture, and how many classes it sees."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ADM_SPLIT = 5000
FIDELITY_SPLITS, FIDELITY_SEED = 10, 2020


class ScoreStream:
    """``mean over splits of exp(mean KL(p(y|x) || p(y)))`` (Salimans et al. 2016), of logits that
    come in parts, in order; float64 sums row by row, so that the parts do not count.

    Args:
        split_of: (N,) the split that each picture falls into, from 0 without gaps.
    """

    def __init__(self, split_of: NDArray[np.int64]) -> None:
        self._split_of = torch.from_numpy(split_of)
        self._sizes = torch.bincount(self._split_of)
        self._seen = 0
        self._sums: Tensor | None = None
        self._negative_entropies = torch.zeros(len(self._sizes), dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Take the logits (n, classes) of the next pictures, on the host."""
        splits = self._split_of[self._seen : self._seen + len(logits)]
        self._seen += len(logits)
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        if self._sums is None:
            self._sums = p.new_zeros(len(self._sizes), p.shape[1])
        self._sums.index_add_(0, splits, p)
        self._negative_entropies.index_add_(0, splits, (p * log_p).sum(1))

    def score(self) -> float:
        """The score; every picture must have come."""
        assert self._sums is not None, "no logits were added"
        assert self._seen == len(self._split_of), "some pictures have not come"
        marginal = self._sums / self._sizes[:, None]
        entropies = torch.xlogy(marginal, marginal).sum(1)
        return (self._negative_entropies / self._sizes - entropies).exp().mean().item()


def adm_splits(count: int) -> NDArray[np.int64]:
    """The ADM suite's: 5,000 pictures each, as they come, and a last one of what is left
    (Dhariwal and Nichol 2021, ``evaluator.py``).
    """
    return np.arange(count, dtype=np.int64) // ADM_SPLIT


def fidelity_splits(count: int) -> NDArray[np.int64]:
    """torch-fidelity's: ten of equal size, shuffled with its seed; for 10 pictures or more."""
    order = np.random.RandomState(FIDELITY_SEED).permutation(count)
    ends = np.arange(1, FIDELITY_SPLITS + 1) * count // FIDELITY_SPLITS
    split_of = np.empty(count, np.int64)
    split_of[order] = np.searchsorted(ends, np.arange(count), side="right")
    return split_of
