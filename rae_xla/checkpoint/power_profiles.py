"""Power-function averages of weights (Karras et al. 2024, "EDM2", section 3): their mathematics.

After ``t`` steps the average of a width is the sum of the weights after each step ``s = 1 .. t``,
multiplied by ``(s^e - (s - 1)^e) / t^e``. The exponent ``e`` follows from the width, the standard
deviation of this profile relative to ``t``. Unlike an exponential moving average it forgets the
initial weights, and its length grows with the run.

Sums of such profiles approximate the profile of any other width, so that averages that were stored
at some steps of a run can be combined to an average that was never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_BINS = 4096
"""Profiles of longer runs are compared in this many bins of steps."""

_CUTOFF = 1e-9
"""Singular values below this share of the largest are dropped: profiles of close steps are almost
the same, and differences of weights stored in float32 carry no more information."""


@dataclass(frozen=True)
class Combination:
    """Coefficients that combine stored averages to one of another width.

    Attributes:
        coefficients: one for each stored average; their sum is 1.
        error: distance of the combined profile from the exact one, relative to its norm.
    """

    coefficients: tuple[float, ...]
    error: float


def exponent(width: float) -> float:
    """Return the exponent ``e`` of a width, in (0, 0.28]: 17.97 for 0.05, 7.94 for 0.10.

    It solves ``width = e^(1/2) (e + 1)^-1 (e + 2)^-1/2``; ``e - 1`` is gamma in the paper.
    """
    inverse = width**-2
    roots = np.roots([1.0, 4.0, 5.0 - inverse, 2.0]).astype(np.complex128)
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


def shares(width: float, step: int, edges: Array) -> Array:
    """Return the share of the steps between successive ``edges`` in an average.

    Args:
        width: of the average.
        step: number of steps after which it was stored, at least 1.
        edges: numbers of steps, increasing from 0 on. Between s - 1 and s is the weight of the
            model after step s.
    """
    cumulated: Array = (np.minimum(edges, step) / step) ** exponent(width)
    return np.diff(cumulated)


def combine(stored: Sequence[tuple[int, float]], step: int, width: float) -> Combination:
    """Find the combination of stored averages whose profile is closest to that of a width.

    Args:
        stored: step and width of every average, none of them after ``step``.
        step: number of steps after which the average is wanted.
        width: of that average.
    """
    inner = np.linspace(0, step, min(step, _BINS) + 1).round()
    edges = np.unique(np.concatenate([inner, [float(t) for t, _ in stored]]))
    scale = np.diff(edges) ** -0.5  # sums over bins approximate integrals of squared profiles
    profiles = np.stack([shares(w, t, edges) * scale for t, w in stored], axis=1)
    target = shares(width, step, edges) * scale
    # Their sum must be 1, so that a weight that never changes is reproduced exactly: differences
    # from the last average have coefficients without that condition.
    base = profiles[:, -1]
    differences = profiles[:, :-1] - base[:, None]
    found = np.linalg.lstsq(differences, target - base, rcond=_CUTOFF)[0]
    coefficients = np.append(found, 1 - found.sum())
    left = profiles @ coefficients - target
    error = float(np.linalg.norm(left) / np.linalg.norm(target))
    return Combination(tuple(map(float, coefficients)), error)
