"""Counter-based random numbers: each is a hash of its counters, without generator state.

A number depends on (seed, purpose, epoch, sample) alone: not on the host, the worker, the order of
calls or the version of NumPy. So the order of samples, their crops and their flips can be computed
for any step, and a checkpoint saves nothing about them. The hash chains the SplitMix64 finaliser
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


class Purpose(IntEnum):
    """What a random number is used for; numbers for different purposes are independent."""

    BLOCK = 0
    WINDOW = 1
    CROP_X = 2
    CROP_Y = 3
    FLIP = 4
    SHARD_ORDER = 5
    REPLACEMENT = 6
    SOURCE = 7
    CAPTION = 8
    PROMPT = 9
    PROMPT_DROPOUT = 10


def counter_hash(*counters: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return 64 random bits for every combination of ``counters`` (integers; arrays broadcast)."""
    state = np.zeros(1, np.uint64)
    for counter in counters:
        if isinstance(counter, np.ndarray):
            value = counter.astype(np.uint64)
        else:
            value = np.array([int(counter) & _MASK], np.uint64)
        state = _mix(state + (value + np.uint64(1)) * _GOLDEN)
    return state


def uniform(*counters: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for every combination of ``counters``."""
    return (counter_hash(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the SplitMix64 finaliser: a bijection in which every input bit affects every output
    bit.
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
