"""Random numbers without a state: a hash of counters.

Whoever knows (seed, what for, epoch, sample) gets the same number, on any host, in any worker, in
any order and with any version of NumPy; so the order of samples and their crops and flips can be
looked up, and nothing about them needs saving. The hash chains the SplitMix64 finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a number is drawn for: numbers for different purposes are independent."""

    BLOCK = 0
    WINDOW = 1
    CROP_X = 2
    CROP_Y = 3
    FLIP = 4
    SHARD_ORDER = 5
    REPLACEMENT = 6
    SOURCE = 7


def counter_hash(*counters: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for every combination of ``counters`` (integers; arrays broadcast)."""
    state = np.zeros(1, np.uint64)
    for counter in counters:
        if isinstance(counter, np.ndarray):
            word = counter.astype(np.uint64)
        else:
            word = np.array([int(counter) & _MASK], np.uint64)
        state = _mix(state + (word + np.uint64(1)) * _GOLDEN)
    return state


def uniform(*counters: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for every combination of ``counters``."""
    return (counter_hash(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: a bijection in which every input bit moves every output bit."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))
